"""Learning-rate schedules, with torchtitan's semantics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from titan_lite.config.component import Component, ConfigBase
from titan_lite.config.errors import CROSS_FIELD, Problem

if TYPE_CHECKING:
    from titan_lite.job import Job


class LRScheduler(Component):
    """Linear warm-up, a stable phase, then a decay that would reach its end one step after the last."""

    class Config(ConfigBase):
        warmup_steps: Annotated[int, Field(ge=0)] = 200
        """Steps of linear warm-up; more than the run has are cut to its length, with a warning."""
        total_steps: Annotated[int | None, Field(gt=0)] = None
        """Steps the schedule is laid out for; default training.steps."""
        decay_ratio: Annotated[float | None, Field(ge=0, le=1)] = None
        """Share of the steps that decay, after a stable phase; default: everything after the warm-up."""
        decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
        """Shape of the decay."""
        min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
        """Learning rate at the end of the decay, as a factor of the peak."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if (
                self.decay_ratio
                and self.warmup_steps
                and round(self.decay_ratio * (self.total_steps or job.training.steps)) == 0
            ):
                yield Problem(
                    code=CROSS_FIELD,
                    key=".decay_ratio",
                    value=self.decay_ratio,
                    why="rounds to no step of decay",
                    allowed="at least half of 1 / training.steps, or 0",
                )

    def __init__(self, config: Config, steps: int):
        total = config.total_steps or steps
        self.config = config
        self.warmup = min(config.warmup_steps, total)
        decay = total - self.warmup if config.decay_ratio is None else round(total * config.decay_ratio)
        self.decay = min(decay, total - self.warmup)
        # One step more than the run has, so that the last step still learns.
        self.decay_start = total + 1 - self.decay

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied with at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < self.decay_start:
            return 1.0
        progress = min((step + 1 - self.decay_start) / self.decay, 1.0) if self.decay else 0.0
        shape = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }
        return self.config.min_lr_factor + (1 - self.config.min_lr_factor) * shape[self.config.decay_type]
