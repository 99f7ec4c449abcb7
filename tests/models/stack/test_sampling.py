"""How many iterations a step runs, and the state before the first one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models.tiny import tiny_model
from titan_lite.models.context import Context, NoMemory
from titan_lite.models.dropout import Noise
from titan_lite.models.stack.recurrent.sampling import IterationSampling
from titan_lite.models.stack.recurrent.state import State

CPU = torch.device("cpu")


def sampling(table: object = "lognormal_poisson", mean: int = 32, backprop: int = 8) -> IterationSampling:
    return IterationSampling.Config.choose(table).build(mean=mean, backprop=backprop)


def test_moments_of_a_million_draws():
    """features.md 1.6: mean 33 +- 0.1, variance 322 +- 8 (theory 322.8), median 29, P(r > 64) = 5.8 %."""
    r = sampling().numbers(1_000_000, torch.Generator().manual_seed(0))
    assert r.mean().item() == pytest.approx(33, abs=0.1)
    assert r.var().item() == pytest.approx(322, abs=8)
    assert r.median() == 29
    assert (r > 64).double().mean().item() == pytest.approx(0.058, abs=0.002)
    assert r.min() >= 1


@pytest.mark.parametrize("backprop", [1, 2, 8, 40])
def test_expected_executions_are_the_means_of_draws(backprop: int):
    for mean, sigma in ((32, 0.5), (3, 1.0)):
        drawn = sampling({"type": "lognormal_poisson", "sigma": sigma}, mean, backprop)
        r = drawn.numbers(400_000, torch.Generator().manual_seed(1))
        expected = drawn.expected()
        assert expected.forward == mean + 1
        assert expected.graded == pytest.approx(r.clamp(max=backprop).mean().item(), rel=5e-3)


def test_draws_follow_from_seed_and_step():
    drawn = sampling()
    steps = [drawn.draw(7, step) for step in range(400)]
    assert steps == [sampling().draw(7, step) for step in range(400)]
    assert steps != [drawn.draw(8, step) for step in range(400)]
    r = torch.tensor([sum(step) for step in steps], dtype=torch.float64)
    assert r.mean().item() == pytest.approx(33, abs=4 * 18 / 20)  # 4 standard errors of 400 draws
    assert len(set(r.tolist())) > 30
    for ungraded, graded in steps:
        assert graded <= 8
        assert ungraded == 0 or graded == 8
    assert sampling("fixed").draw(7, 0) == (24, 8)
    assert sampling("fixed", mean=3).draw(7, 0) == (0, 3)


def test_other_stacks_do_not_iterate():
    assert tiny_model().stack.iterations(0, 0) is None


D = 256


def context(first: int = 0, T: int = 64, noise: Noise | None = None) -> Context:
    return Context(torch.arange(first, first + T), None, NoMemory(), noise, {}, {})


def drawn(kind: str, told: Context, rows: int = 4) -> Tensor:
    return State.Config.choose(kind).build(dim=D)(torch.zeros(rows, len(told.positions), D), told)


def noise(rows: list[int], step: int = 0) -> Noise:
    return Noise.of(0, CPU, step, torch.tensor(rows))


# Standard deviation, and the largest magnitude where there is one. N(0, 1) cut at 3 has the standard deviation 0.98658.
@pytest.mark.parametrize(
    ("kind", "std", "largest"),
    [
        ("like", math.sqrt(0.4) * 0.98658, 3 * math.sqrt(0.4)),
        ("normal", 1.0, None),
        ("embed", D**-0.5, None),
        ("unit", 1.0, None),
    ],
)
def test_distributions(kind: str, std: float, largest: float | None):
    x = drawn(kind, context(noise=noise(list(range(16)))), rows=16) / std
    assert x.mean().item() == pytest.approx(0, abs=4e-3)  # 2 standard errors of 262144 draws
    assert x.std().item() == pytest.approx(1, abs=6e-3)
    beyond = (x.abs() > 1).double().mean().item()
    assert beyond == pytest.approx(0.3173 if largest is None else 0.3224, abs=6e-3)
    if largest is None:
        assert x.abs().max() > 3.5
    else:
        assert largest / std * 0.97 < x.abs().max() < largest / std
    if kind == "unit":
        torch.testing.assert_close(x.mean(-1), torch.zeros(16, 64), atol=1e-6, rtol=0)
        torch.testing.assert_close(x.var(-1, correction=0), torch.ones(16, 64), atol=1e-5, rtol=0)


def test_a_state_follows_from_step_row_and_position():
    whole = drawn("like", context(noise=noise([5, 6, 7])), rows=3)
    assert torch.equal(drawn("like", context(noise=noise([6])), rows=1), whole[1:2])
    for other in (noise([5, 6, 7], step=1), noise([8, 9, 10])):
        assert not torch.isclose(drawn("like", context(noise=other), rows=3), whole).any(dim=-1).all()
    # Neither rows nor positions nor features repeat.
    flat = whole.flatten(0, 1)
    assert (flat @ flat.t() / D - 0.4 * torch.eye(len(flat))).abs().max() < 0.25


def test_outside_training_a_token_s_state_follows_from_its_position():
    whole = drawn("like", context(), rows=2)
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(drawn("like", context(first=10, T=5), rows=1)[0], whole[0, 10:15])
    assert not torch.equal(drawn("like", context(noise=noise([0])), rows=1)[0], whole[0])


def test_states_that_are_not_drawn():
    e = torch.randn(2, 64, D)
    assert not State.Config.choose("zero").build(dim=D)(e, context()).any()
    assert State.Config.choose("none").build(dim=D)(e, context()) is e
