"""Learning-rate schedules against hand-computed values of torchtitan's formula."""

from __future__ import annotations

import math
from typing import Any

import pytest

from titan_lite.optim.schedule import LRScheduler


def factors(steps: int, **config: Any) -> list[float]:
    schedule = LRScheduler.Config.model_validate(config).build(steps=steps)
    return [schedule.factor(step) for step in range(steps)]


def test_warmup_then_linear_decay_to_one_step_before_zero():
    # 4 steps of warm-up, one at the peak (the virtual last step moves the decay by one), then 1 - k/6 for k = 1 ... 5.
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors(10, warmup_steps=4) == pytest.approx(expected)


def test_stable_phase_and_shapes():
    # decay_ratio 0.4 of 10 steps: 2 of warm-up, 5 stable, then progress 1/4, 2/4, 3/4.
    linear = factors(10, warmup_steps=2, decay_ratio=0.4)
    assert linear == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    cosine = factors(10, warmup_steps=2, decay_ratio=0.4, decay_type="cosine")
    assert cosine[7:] == pytest.approx([0.5 * (1 + math.cos(math.pi * p)) for p in (0.25, 0.5, 0.75)])
    root = factors(10, warmup_steps=2, decay_ratio=0.4, decay_type="sqrt")
    assert root[7:] == pytest.approx([1 - math.sqrt(p) for p in (0.25, 0.5, 0.75)])


def test_minimum_and_no_decay():
    assert factors(10, warmup_steps=4, min_lr_factor=0.1)[-1] == pytest.approx(0.1 + 0.9 / 6)
    assert factors(5, warmup_steps=0, decay_ratio=0.0) == [1.0] * 5


def test_warmup_longer_than_the_run_is_cut():
    assert factors(4, warmup_steps=200) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_total_steps_outlast_the_run():
    assert factors(5, warmup_steps=2, total_steps=20) == factors(20, warmup_steps=2)[:5]
