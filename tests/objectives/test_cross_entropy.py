"""The chunked cross entropy against torch's dense one, its gradients and its memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from titan_lite.data.batch import IGNORE
from titan_lite.objectives.cross_entropy import CrossEntropy

RTOL = 1e-5


def case(n: int = 3, t: int = 21, d: int = 16, v: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output matrix and targets, some of them without a loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, t, d, generator=generator).requires_grad_()
    weight = torch.randn(v, d, generator=generator).requires_grad_()
    targets = torch.randint(v, (n, t), generator=generator)
    targets[0, ::2] = IGNORE
    targets[2] = IGNORE
    return x, weight, targets


@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 21, 63, 1000])
def test_against_torch(chunk_tokens: int):
    x, weight, targets = case()
    loss = CrossEntropy(chunk_tokens)(x, weight, targets) / 5
    loss.backward()
    got = loss.detach(), x.grad, weight.grad
    x, weight, targets = case()
    reference = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten(), reduction="sum") / 5
    reference.backward()
    for ours, theirs in zip(got, (reference.detach(), x.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=1e-5)


def test_no_target_gives_no_loss_and_no_gradient():
    x, weight, targets = case()
    loss = CrossEntropy(7)(x, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_without_gradients_the_loss_is_the_same():
    x, weight, targets = case()
    with torch.no_grad():
        assert CrossEntropy(7)(x, weight, targets) == CrossEntropy(7)(*case()).detach()


def test_frozen_matrix_gets_no_gradient():
    x, weight, targets = case()
    CrossEntropy(7)(x, weight.detach(), targets).backward()
    assert x.grad.any()


def test_bfloat16_logits_are_summed_in_float32():
    x, weight, targets = case()
    low = CrossEntropy(7)(x.detach().bfloat16(), weight.detach().bfloat16(), targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, CrossEntropy(7)(x, weight, targets).detach(), rtol=2e-2, atol=0)


def test_bfloat16_gradients_are_as_good_as_dense_ones():
    """Against float32: sums over 32 chunks and the division by an odd token count must not add to the rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2048, 32, generator=generator)
    weight = torch.randn(256, 32, generator=generator) * 0.1
    targets = torch.randint(256, (1, 2048), generator=generator)

    def gradients(chunk_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in (x, weight)]
        (CrossEntropy(chunk_tokens)(*inputs, targets) / 8155).backward()
        return [tensor.grad.float() for tensor in inputs]

    exact, dense, chunked = gradients(0, torch.float32), gradients(0, torch.bfloat16), gradients(64, torch.bfloat16)
    for reference, ours, theirs in zip(exact, chunked, dense, strict=True):
        assert (ours - reference).norm() <= 1.1 * (theirs - reference).norm()


def peak_bytes(chunk_tokens: int, tokens: int, d: int, v: int) -> int:
    """Peak of what the allocator handed out during loss and backward; the gradient of the matrix is not counted."""
    x = torch.randn(1, tokens, d).requires_grad_()
    weight = torch.randn(v, d).requires_grad_()
    targets = torch.randint(v, (1, tokens))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        CrossEntropy(chunk_tokens)(x, weight, targets).backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - weight.numel() * 4


def test_chunked_memory_is_a_fraction_of_the_dense_logits():
    tokens, d, v, chunk = 512, 64, 8192, 64
    dense_bytes = 2 * tokens * v * 4  # float32 logits and their gradient
    assert peak_bytes(0, tokens, d, v) >= dense_bytes
    # One chunk's logits, and the gradient of x.
    bound = chunk * v * 4 + tokens * d * 4 + 50_000
    assert peak_bytes(chunk, tokens, d, v) <= bound < dense_bytes / 8
