"""The chunked cross entropy against torch's dense one: its gradients, through every function of logits, its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import DispatchedOps
from titan_lite.data.batch import IGNORE
from titan_lite.models.head.lm import PLUS
from titan_lite.models.head.logit_cap import Tanh
from titan_lite.models.head.logit_scale import TIMES_EACH, Times
from titan_lite.models.head.output import Link, Output
from titan_lite.objectives.cross_entropy import CrossEntropy

RTOL = 1e-5
CHAINS = ["", "bias", "learned", "constant", "cap", "bias learned cap", "bias constant cap"]
"""Links of the chain, in the order in which a head puts them."""
CAP = 3.0
"""Near the size of the logits, so that the cap's slope is far from 1."""


def case(n: int = 3, t: int = 21, d: int = 16, v: int = 50) -> dict[str, Tensor]:
    """Hidden states, output matrix, bias and scale of the logits, and targets, some of them without a loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, t, d, generator=generator).requires_grad_()
    weight = torch.randn(v, d, generator=generator).requires_grad_()
    bias = torch.randn(v, generator=generator).requires_grad_()
    scale = (1 + 0.5 * torch.randn(v, generator=generator)).requires_grad_()
    targets = torch.randint(v, (n, t), generator=generator)
    targets[0, ::2] = IGNORE
    targets[2:] = IGNORE
    return {"x": x, "weight": weight, "bias": bias, "learned": scale, "targets": targets}


def output(inputs: dict[str, Tensor], chain: str = "") -> Output:
    links = {
        "bias": Link(PLUS, inputs["bias"]),
        "learned": Link(TIMES_EACH, inputs["learned"]),
        "constant": Link(Times(0.3)),
        "cap": Link(Tanh(CAP)),
    }
    return Output(inputs["weight"], tuple(links[name] for name in chain.split()))


def expected_logits(inputs: dict[str, Tensor], chain: str) -> Tensor:
    """By the formulas."""
    z = inputs["x"] @ inputs["weight"].t()
    for name in chain.split():
        if name == "bias":
            z = z + inputs["bias"]
        elif name == "learned":
            z = z * inputs["learned"]
        elif name == "constant":
            z = 0.3 * z
        else:
            z = CAP * torch.tanh(z / CAP)
    return z


def gradients(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(got[name], reference, rtol=RTOL, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 21, 63, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_against_torch(chunk_tokens: int, chain: str, z_loss: float):
    ours, theirs = case(), case()
    loss = CrossEntropy(chunk_tokens, z_loss=z_loss)(ours["x"], output(ours, chain), ours["targets"]) / 5
    loss.backward()
    z, targets = expected_logits(theirs, chain).flatten(0, 1), theirs["targets"].flatten()
    reference = F.cross_entropy(z, targets, reduction="sum") / 5
    if z_loss:
        reference = reference + z_loss * z[targets != IGNORE].exp().sum(1).log().square().sum() / 5
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=RTOL, atol=0)
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_compiled_equals_eager(z_loss: float):
    """aot_eager runs all of the tracing, and the overwriting of inputs with it."""

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    for chunk_tokens in (0, 24):
        ours, theirs = case(), case()
        for inputs, wrap in ((ours, compiled), (theirs, lambda function: function)):
            loss = CrossEntropy(chunk_tokens, wrap, z_loss)
            loss(inputs["x"], output(inputs, "bias learned cap"), inputs["targets"]).backward()
        assert_close(gradients(ours), gradients(theirs))
        assert len(gradients(ours)) == 4


def test_logits_are_what_the_loss_is_of():
    inputs = case()
    for chain in CHAINS:
        got = output(inputs, chain).logits(inputs["x"])
        torch.testing.assert_close(got, expected_logits(inputs, chain), rtol=RTOL, atol=1e-5)


def test_no_target_gives_no_loss_and_no_gradient():
    inputs = case()
    loss = CrossEntropy(7, z_loss=0.1)(
        inputs["x"], output(inputs, "bias cap"), torch.full_like(inputs["targets"], IGNORE)
    )
    loss.backward()
    assert loss.item() == 0
    assert not any(grad.any() for grad in gradients(inputs).values())


def test_without_gradients_the_loss_is_the_same_and_costs_no_backward():
    inputs = case()
    counter = DispatchedOps()
    with torch.no_grad():
        counter.start()
        loss = CrossEntropy(7)(inputs["x"], output(inputs), inputs["targets"])
        ops = counter.stop()
    reference = CrossEntropy(7)(inputs["x"], output(inputs), inputs["targets"]).detach()
    torch.testing.assert_close(loss, reference, rtol=RTOL, atol=0)
    assert ops["aten.mm"] == 9  # one product for each chunk of the 63 tokens
    assert ops["aten.addmm_"] == 0


def test_frozen_parameters_get_no_gradient_and_cost_none():
    inputs = case()
    for name in ("weight", "bias"):
        inputs[name].requires_grad_(False)
    counter = DispatchedOps()
    counter.start()
    CrossEntropy(7)(inputs["x"], output(inputs, "bias learned"), inputs["targets"]).backward()
    assert counter.stop()["aten.addmm_"] == 0
    assert gradients(inputs).keys() == {"x", "learned"}


def test_bfloat16_logits_are_summed_in_float32():
    inputs = case()
    low = {name: tensor.detach().bfloat16() for name, tensor in inputs.items() if name != "targets"}
    for chain in ("", "bias learned cap"):
        got = CrossEntropy(7)(low["x"], output(low, chain), inputs["targets"])
        assert got.dtype == torch.float32
        reference = CrossEntropy(7)(inputs["x"], output(inputs, chain), inputs["targets"]).detach()
        torch.testing.assert_close(got, reference, rtol=2e-2, atol=0)


@pytest.mark.parametrize(("chain", "factor"), [("", 1.1), ("bias learned cap", 1.2)])
def test_bfloat16_gradients_are_as_good_as_dense_ones(chain: str, factor: float):
    """Against float32: sums over 32 chunks and the division by an odd token count must not add to the rounding.

    Functions of logits work in float32 both ways: there is less of an error in which the chunks' own roundings could
    hide.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(1, 2048, 32, generator=generator),
        "weight": torch.randn(256, 32, generator=generator) * 0.1,
        "bias": torch.randn(256, generator=generator) * 0.1,
        "learned": torch.randn(256, generator=generator),
    }
    targets = torch.randint(256, (1, 2048), generator=generator)

    def gradients_of(chunk_tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        (CrossEntropy(chunk_tokens)(inputs["x"], output(inputs, chain), targets) / 8155).backward()
        return {name: grad.float() for name, grad in gradients(inputs).items()}

    exact, dense = gradients_of(0, torch.float32), gradients_of(0, torch.bfloat16)
    chunked = gradients_of(64, torch.bfloat16)
    assert chunked.keys() == dense.keys() == exact.keys()
    for name, reference in exact.items():
        assert (chunked[name] - reference).norm() <= factor * (dense[name] - reference).norm(), name


def peak_bytes(chunk_tokens: int, chain: str, tokens: int, d: int, v: int) -> int:
    """Peak of what the allocator handed out during loss and backward; gradients of parameters are not counted."""
    inputs = case(1, tokens, d, v)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        CrossEntropy(chunk_tokens)(inputs["x"], output(inputs, chain), inputs["targets"].clamp(min=0)).backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - inputs["weight"].numel() * 4


@pytest.mark.parametrize(
    ("chain", "chunks"), [("", 1), ("bias", 2), ("learned", 2), ("cap", 3), ("bias learned cap", 5)]
)
def test_chunked_memory_is_a_fraction_of_the_dense_logits(chain: str, chunks: int):
    """What is kept of a chunk: its logits; for each function of the chain, what it was given; and a temporary."""
    tokens, d, v, chunk = 512, 64, 8192, 64
    dense_bytes = 2 * tokens * v * 4  # float32 logits and their gradient
    assert peak_bytes(0, chain, tokens, d, v) >= dense_bytes
    # With them the gradients of x and of the parameters of the chain.
    bound = chunks * chunk * v * 4 + tokens * d * 4 + 4 * v * 4 + 50_000
    assert peak_bytes(chunk, chain, tokens, d, v) <= bound < dense_bytes / (8 / chunks) / 0.75
