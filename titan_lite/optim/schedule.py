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
        """Share of the steps that decay, after a stable phase; default: everything after the warm-up. More than
        that is cut to it, with a warning."""
        decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
        """Shape of the decay."""
        min_lr_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
        """Learning rate at the end of the decay, as a factor of the peak."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if self.decay_ratio and self.warmup_steps and self.phases(job.training.steps)[2] == 0:
                yield Problem(
                    code=CROSS_FIELD,
                    key=".decay_ratio",
                    value=self.decay_ratio,
                    why="rounds to no step of decay",
                    allowed="at least half of 1 / training.steps, or 0",
                )

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            total, warmup, decay = self.phases(job.training.steps)
            if self.warmup_steps > total:
                name = "lr_scheduler.total_steps" if self.total_steps else "training.steps"
                yield f"lr_scheduler.warmup_steps = {self.warmup_steps} is cut to {name} = {total}"
            if decay > total - warmup:
                yield (
                    f"lr_scheduler.decay_ratio = {self.decay_ratio} is {decay} of {total} steps, "
                    f"cut to the {total - warmup} that the warm-up leaves"
                )

        def phases(self, steps: int) -> tuple[int, int, int]:
            """(all steps, those of the warm-up, those the decay asks for) of a run of `steps`."""
            total = self.total_steps or steps
            warmup = min(self.warmup_steps, total)
            return total, warmup, total - warmup if self.decay_ratio is None else round(total * self.decay_ratio)

    def __init__(self, config: Config, steps: int):
        self.config = config
        total, self.warmup, decay = config.phases(steps)
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
