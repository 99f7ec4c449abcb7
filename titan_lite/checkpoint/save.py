"""One save, from a dict of shards to a step folder under its final name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from titan_lite.checkpoint.facts import Origin, RunFacts, describe
from titan_lite.checkpoint.index import Index
from titan_lite.checkpoint.manifest import FileSum, Manifest
from titan_lite.checkpoint.shard import Shard
from titan_lite.checkpoint.world import World
from titan_lite.checkpoint.writer import ShardPlanner, StepWriter

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class SaveError(RuntimeError):
    """A save failed on disk; nothing of it is left, and every earlier checkpoint is as it was."""


@dataclass(frozen=True)
class SaveRequest:
    """What to write where. `train_state` is JSON, already encoded."""

    folder: Path
    origin: Origin
    shards: Mapping[str, Shard]
    train_state: bytes


def write_step(request: SaveRequest, facts: RunFacts, world: World) -> None:
    """Writes the step folder. Collective over `world.save_group`; may run beside collectives on other groups.

    Raises SaveError on every rank where a rank met an error of the file system.
    """

    def manifest(index: Index, files: Mapping[str, FileSum]) -> Manifest:
        return describe(facts, request.origin, index, files)

    writer = StepWriter(request.folder, request.origin.step, request.train_state, manifest)
    try:
        dcp.save(
            dict(request.shards),
            storage_writer=writer,
            planner=ShardPlanner(),
            process_group=world.save_group,
            no_dist=world.size == 1,
        )
    except CheckpointException as error:  # every rank has stopped writing: DCP gathers all results before it raises
        writer.abandon()
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        bug = next((cause for cause in causes.values() if not isinstance(cause, OSError)), None)
        if bug is not None:
            raise bug from error
        texts = [f"rank {rank}: {cause.strerror} ({cause.filename})" for rank, cause in causes.items()]  # type: ignore[attr-defined]
        raise SaveError(f"step {request.origin.step} was not saved: {'; '.join(texts)}") from None
