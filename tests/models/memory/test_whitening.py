"""Running statistics of summaries against closed forms, and what whitening is for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.memory.whitening import Whitening
from titan_lite.models.spec import collect_specs

D = 6
EPS = 1e-5
ATOL = 1e-9
"""float64."""


def whitening(decay: float = 1.0, eps: float = EPS) -> Whitening:
    module = Whitening(D, decay, eps)
    specs = collect_specs(module)
    for name, buffer in module.named_buffers():
        assert specs[name].start == 0.0
        torch.nn.init.zeros_(buffer)
    return module.train()


def drawn(n: int, seed: int = 0) -> Tensor:
    """(2, n, D) with a mean far from 0, axes of different lengths, and some that lie together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(9)) * torch.logspace(-1, 1, D)
    return torch.randn(2, n, D, generator=generator) @ mixing + 100


def followed(module: Whitening, steps: list[Tensor]) -> Whitening:
    for step in steps:
        module.count(step)
        module.after_step(lambda tensor: tensor)
    return module


def zca(module: Whitening, x: Tensor) -> Tensor:
    """(h - mean) (covariance + eps)^(-1/2), with the symmetric root."""
    values, vectors = torch.linalg.eigh(module.covariance)
    return (x.double() - module.mean) @ (vectors * (values + module.eps).rsqrt()) @ vectors.T


def test_mean_and_covariance_are_those_of_all_steps() -> None:
    steps = [drawn(40, seed) for seed in range(4)]
    module = followed(whitening(), steps)
    whole = torch.cat(steps, dim=1).flatten(0, 1).double()
    torch.testing.assert_close(module.mean, whole.mean(0), atol=ATOL, rtol=0)
    torch.testing.assert_close(module.covariance, whole.T.cov(correction=0), atol=1e-7, rtol=0)


def test_older_steps_weigh_less() -> None:
    steps, decay = [drawn(n, n) for n in (10, 30, 20)], 0.7
    module = followed(whitening(decay), steps)
    weights = torch.cat([torch.full((2 * n,), decay ** (2 - i)) for i, n in enumerate((10, 30, 20))]).double()
    whole = torch.cat([step.flatten(0, 1) for step in steps]).double()
    mean = (weights[:, None] * whole).sum(0) / weights.sum()
    expected = ((whole - mean).T * weights) @ (whole - mean) / weights.sum()
    torch.testing.assert_close(module.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(module.covariance, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(module.weight, weights.sum(), atol=1e-5, rtol=0)


def test_rows_may_be_split_over_micro_batches_and_ranks() -> None:
    step = drawn(40)
    parts = whitening()
    parts.count(step[:1])
    parts.count(step[1:])
    parts.after_step(lambda tensor: tensor)
    ranks = whitening()
    ranks.count(step)
    ranks.after_step(lambda tensor: 2 * tensor)  # another one that counted the same
    for other in (parts, ranks):
        for name in ("mean", "covariance"):
            torch.testing.assert_close(
                getattr(other, name), getattr(followed(whitening(), [step]), name), atol=1e-7, rtol=0
            )


def test_whitened_summaries_have_the_covariance_one() -> None:
    module, x = followed(whitening(), [drawn(50, seed) for seed in range(20)]), drawn(20_000, 99)
    white: Tensor = module(x)
    assert white.shape == x.shape
    flat = white.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(D).double(), atol=0.1, rtol=0)
    torch.testing.assert_close(flat.T.cov(), torch.eye(D).double(), atol=0.1, rtol=0)


def test_angles_and_lengths_are_those_of_zca() -> None:
    module, x = followed(whitening(), [drawn(50)]), drawn(7, 3)
    ours, theirs = module(x), zca(module, x)
    for white in (ours, theirs):
        assert white.dtype == torch.float64
    torch.testing.assert_close(ours @ ours.mT, theirs @ theirs.mT, atol=1e-7, rtol=1e-7)
    cosines = [F.cosine_similarity(white[:, :1], white, dim=-1) for white in (ours, theirs)]
    torch.testing.assert_close(*cosines, atol=ATOL, rtol=0)


def test_directions_that_were_never_seen_divide_by_eps() -> None:
    """Fewer summaries than directions, as in the first steps of a training."""
    module = followed(whitening(eps=1e-4), [drawn(1)])
    x = drawn(4, 5)
    assert module(x).isfinite().all()
    torch.testing.assert_close(module(x) @ module(x).mT, zca(module, x) @ zca(module, x).mT, atol=1e-3, rtol=1e-6)
    untouched = whitening(eps=0.25)
    torch.testing.assert_close(untouched(x), 2 * x.double())


def test_only_training_counts() -> None:
    module = whitening().eval()
    assert torch.equal(followed(module, [drawn(5)]).mean, torch.zeros(D).double())
