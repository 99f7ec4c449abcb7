"""torchtitan's sections that have no part here, read and told of: memory estimation, fault tolerance, experimental."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from titan_lite.config.component import ConfigBase
from titan_lite.config.fields import Count, PositiveInt

if TYPE_CHECKING:
    from titan_lite.job import Job


class MemoryEstimation(ConfigBase):
    """[memory_estimation]: torchtitan's in-trainer estimate, here `python -m estimation`."""

    enable: bool = False
    """Not honoured."""
    disable_fake_mode: bool = False
    """Not honoured."""

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.enable:
            yield "memory_estimation.enable is not honoured: `python -m estimation CONFIG` estimates before launch"


class FaultTolerance(ConfigBase):
    """[fault_tolerance]: torchft, which has no part here."""

    enable: bool = False
    """Not honoured: a run that dies is resumed from its newest checkpoint."""
    process_group: str = "gloo"
    """Idle."""
    process_group_timeout_ms: PositiveInt = 10000
    """Idle."""
    replica_id: Count = 0
    """Idle."""
    group_size: Count = 0
    """Idle."""
    min_replica_size: Count = 1
    """Idle."""
    semi_sync_method: str = ""
    """Idle."""

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.enable:
            yield "fault_tolerance.enable is not honoured: start a run again and it resumes from its newest checkpoint"


class Experimental(ConfigBase):
    """[experimental]: torchtitan's plug-in keys, which would run code named in a config."""

    custom_import: str = ""
    """Not honoured."""
    custom_args_module: str = ""
    """Not honoured."""

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        for key in ("custom_import", "custom_args_module"):
            if getattr(self, key):
                yield f"experimental.{key} is not honoured: nothing in a config runs code"
