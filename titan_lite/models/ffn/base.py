"""The feed-forward slot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module
from titan_lite.parallel.plan import COL, GATHER, ROW, Plan, split_problems

if TYPE_CHECKING:
    from titan_lite.config.errors import Problem
    from titan_lite.job import Job


class FFN(Module):
    """(B, T, D), context -> (B, T, D), each token on its own."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "ffn"
        default_type: ClassVar[str | None] = "glu"
        has_experts: ClassVar[bool] = False
        """Whether there are experts which can be spread over ranks."""


class DenseFFN(FFN):
    """A network whose inner features each come from all of x and go into all of the output, by themselves.

    So ranks can have some of them each: all children but `down`, which adds them up, make or change inner features.
    """

    class Config(FFN.Config):
        hidden: int

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            yield from split_problems(job, ".hidden", self.hidden)

    def tp_plan(self) -> Plan:
        return {"": GATHER, **dict.fromkeys(self._modules, COL), "down": ROW}
