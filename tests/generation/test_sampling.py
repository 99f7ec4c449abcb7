"""Each step against transformers' processor of that name, on the same logits; and what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from titan_lite.generation.sampling import Sampling, drawn
from titan_lite.generation.steps import STEPS

V = 512
THEIRS: dict[str, Any] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
ATOL = 1e-12
"""Probabilities in float64 on both sides."""


def logits(rows: int = 16) -> Tensor:
    """(B, V) in float64: some rows flat, some steep."""
    generator = torch.Generator().manual_seed(0)
    steep = torch.linspace(0.2, 5.0, rows, dtype=torch.float64)[:, None]
    return steep * torch.randn(rows, V, generator=generator, dtype=torch.float64)


def texts(rows: int = 16) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (rows, 200), generator=generator).tolist()


def ours(sampling: Sampling) -> Tensor:
    found = logits()
    for step in sampling.steps():
        found = step(found, texts())
    return found.softmax(-1)


def theirs(**choices: float) -> Tensor:
    processors = LogitsProcessorList(kind(choices[name]) for name, kind in THEIRS.items() if name in choices)
    return processors(torch.tensor(texts()), logits()).softmax(-1)


def test_every_step_has_its_counterpart_and_its_place() -> None:
    assert [step.name for step in STEPS] == list(THEIRS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.7),
        ("repetition_penalty", 0.6),
        ("temperature", 0.3),
        ("temperature", 4.0),
        ("top_k", 1),
        ("top_k", 20),
        ("top_k", V + 5),
        ("top_p", 0.3),
        ("top_p", 0.95),
        ("min_p", 0.02),
        ("min_p", 0.5),
        ("typical_p", 0.2),
        ("typical_p", 0.9),
    ],
)
def test_a_step_against_transformers(name: str, value: float) -> None:
    found, expected = ours(Sampling(**{name: value})), theirs(**{name: value})
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_all_steps_together_against_transformers() -> None:
    choices = {
        "repetition_penalty": 1.2,
        "temperature": 1.5,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.8,
    }
    found, expected = ours(Sampling(**choices)), theirs(**choices)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_rows_know_nothing_of_each_other() -> None:
    sampling = Sampling(1.5, 60, 0.9, 0.01, 0.8, 1.2)
    whole = ours(sampling)
    for row in range(16):
        one = logits()[row : row + 1]
        for step in sampling.steps():
            one = step(one, texts()[row : row + 1])
        assert torch.equal(one.softmax(-1)[0], whole[row])


def test_draws_have_the_frequencies_of_the_probabilities() -> None:
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0]], dtype=torch.float64)
    generator, n = torch.Generator().manual_seed(0), 4000
    counts = torch.bincount(torch.tensor([drawn(p.log(), [generator])[0] for _ in range(n)]), minlength=5)
    assert counts[1] == counts[4] == 0
    expected = n * p[0]
    spread = (expected * (1 - p[0])).sqrt()
    assert ((counts - expected).abs() <= 4 * spread).all()


def test_the_largest_draw_is_a_token_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: largest)
    for seed in range(50):
        random = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        random[0, 30:] = float("-inf")
        assert drawn(random, [torch.Generator()])[0] < 30


def chosen(sampling: Sampling, values: Tensor) -> list[int]:
    return sampling.sampler()(values, [[]] * len(values), [torch.Generator()] * len(values))


def test_a_tiny_temperature_is_greedy() -> None:
    values = torch.tensor([[0.0, 3.0, 2.999], [5.0, 5.0, 4.0]])
    assert chosen(Sampling(temperature=0), values) == [1, 0]
    assert chosen(Sampling(temperature=1e-300), values[:1]) == [1]
    assert chosen(Sampling(temperature=1e-300, top_k=2), values[:1]) == [1]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=2)]
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_logits_are_told(sampling: Sampling, broken: float) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        chosen(sampling, torch.tensor([[0.0, 1.0], [0.0, broken]]))


def test_what_has_no_effect_is_known() -> None:
    assert Sampling(temperature=0, top_k=3, min_p=0.1, repetition_penalty=1.3).idle() == ["top_k", "min_p"]
    assert Sampling(temperature=0.5, top_k=3).idle() == []
    assert Sampling(temperature=0).idle() == []
