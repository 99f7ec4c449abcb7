"""Frequencies as parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.models.position.turning import ATOL, position, queries_and_keys, scores, turned
from tests.models.tiny import VOCAB, tiny_model
from tests.runs import train
from titan_lite.models.spec import collect_specs

LEARNED: dict[str, Any] = {"type": "rope", "frequencies": "learned"}
RTOL = 1e-5
"""fp32: losses of a few steps in another layout."""
WEIGHT_ATOL = 2e-4
"""fp32: weights after them, as in tests/training/test_layouts.py."""


def attention(**form: Any) -> dict[str, Any]:
    return {"n_heads": 4, "n_kv_heads": 2, "position": LEARNED | form}


@pytest.mark.parametrize("form", [{}, {"direction": "reversed"}, {"fraction": 0.5, "layout": "interleaved"}], ids=str)
def test_they_start_as_the_fixed_ones(form: dict[str, Any]):
    q, k = queries_and_keys()
    fixed, learned = position(**form), position(**LEARNED | form)
    assert all(torch.equal(a, b) for a, b in zip(turned(learned, q, k), turned(fixed, q, k), strict=True))
    specs = collect_specs(learned)
    assert {name: (spec.role, spec.fan_out) for name, spec in specs.items()} == {
        "frequencies.log_factor": ("scalar", 4 if "fraction" in form else 8)
    }


def test_they_are_factors_of_the_frequencies():
    """All of them halved: as linear scaling by 2."""
    q, k = queries_and_keys()
    learned = position(**LEARNED)
    torch.nn.init.constant_(learned.frequencies.log_factor, -math.log(2))
    halved = position(scaling={"type": "linear", "factor": 2.0})
    torch.testing.assert_close(scores(learned, q, k), scores(halved, q, k), atol=ATOL, rtol=0)


def test_gradients_are_those_of_finite_differences():
    q, k = queries_and_keys()
    learned = position(**LEARNED, fraction=0.5)
    parameter = learned.frequencies.log_factor
    weights = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)) / 100

    def value() -> torch.Tensor:
        return (scores(learned, q, k).double() * weights).sum()

    value().backward()
    assert parameter.grad is not None
    for j in range(2):
        with torch.no_grad():
            parameter[j] = 1e-2
            above = value()
            parameter[j] = -1e-2
            below = value()
            parameter[j] = 0
        assert parameter.grad[j].item() == pytest.approx(((above - below) / 2e-2).item(), rel=5e-3, abs=1e-4)


def test_each_layer_has_its_own():
    model = tiny_model(attention=attention())
    model(torch.randint(VOCAB, (2, 9))).square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("log_factor")]
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.count_nonzero() == 4 for gradient in gradients)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"activation_checkpoint": {"mode": "full"}, "compile": {"enable": True, "backend": "aot_eager"}},
    ],
    ids=["eager", "checkpointed and compiled"],
)
def test_they_train_when_sharded(pool2, more: dict[str, Any]):
    model = {"attention": attention(direction="reversed", scaling={"type": "lswt", "train_len": 8})}

    def sections(local: int) -> dict[str, Any]:
        return {"model": model, "training": {"local_batch_size": local, "global_batch_size": 8}} | more

    reference = train({"model": model}, 3)
    for run in pool2.run(train, sections(4), 3):
        torch.testing.assert_close(run.losses, reference.losses, rtol=RTOL, atol=0)
        for name, weight in reference.weights.items():
            torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=WEIGHT_ATOL, msg=name)
    moved = [weight for name, weight in reference.weights.items() if name.endswith("log_factor")]
    assert len(moved) == 2
    assert all((weight.abs() > 1e-3).all() for weight in moved)
