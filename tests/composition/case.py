"""One job of an array against one process: three steps, and a checkpoint of each that the other goes on from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.checkpoint.helpers import make_manager
from tests.composition.array import Pair
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from titan_lite.checkpoint.state import memory_tensors, model_tensors, optimizer_tensors
from titan_lite.step import Training

STEPS = 3


class Outcome(NamedTuple):
    """How far a job was from one process."""

    deviations: dict[str, float]
    """The largest of each field of a tolerance, and of the loss of the step after a checkpoint ("resumed")."""
    failures: list[str]
    """What was farther than it may be."""


def compared(
    pair: Pair, pools: Mapping[int, WorkerPool], folder: Path, tolerance: twins.Tolerance = twins.EXACT
) -> Outcome:
    """The job over several ranks against the one in this process."""
    one, several = folder / "one", folder / "several"
    training, size = twins.built(pair.one), pair.one["training"]["local_batch_size"]
    try:
        mine = twins.run(training, STEPS, size)
        save(training, one)
        loss = twins.one_step(training, STEPS, size).loss.item()
        theirs, resumed = on_ranks(pair, one, several, pools)
        load(training, several)
        again = twins.one_step(training, STEPS, size).loss.item()
    finally:
        training.world.close()
    found = twins.deviations(mine, theirs)
    resumptions = {"in the layout": abs(resumed - loss) / abs(loss), "in one process": abs(again - loss) / abs(loss)}
    failures = twins.differences(mine, theirs, tolerance)
    failures += [f"loss resumed {where}: {d:.1e}" for where, d in resumptions.items() if not d <= tolerance.loss]
    largest = {kind: max(values.values()) for kind, values in found.items()}
    return Outcome(largest | {"resumed": max(resumptions.values())}, failures)


def on_ranks(pair: Pair, saved: Path, to_save: Path, pools: Mapping[int, WorkerPool]) -> tuple[twins.Steps, float]:
    """`trained` on a pool's ranks, which all say the same; one rank is this process."""
    if pair.ranks == 1:
        return trained(pair.several, saved, to_save)
    found = pools[pair.ranks].run(trained, pair.several, saved, to_save, timeout=300)
    assert all(steps.losses == found[0][0].losses and resumed == found[0][1] for steps, resumed in found)
    return found[0]


def trained(tables: dict[str, Any], saved: Path, to_save: Path) -> tuple[twins.Steps, float]:
    """The first steps, saved behind them; and the loss of the next step from the checkpoint of another layout."""
    training, size = twins.built(tables), tables["training"]["local_batch_size"]
    try:
        steps = twins.run(training, STEPS, size)
        save(training, to_save)
        load(training, saved)
        return steps, twins.one_step(training, STEPS, size).loss.item()
    finally:
        training.world.close()
        if "compile" in tables and tables["compile"].get("enable"):
            torch._dynamo.reset()


def save(training: Training, folder: Path) -> None:
    """All that a step changes."""
    assert make_manager(folder, training.world).save(STEPS, tensors(training), {})


def load(training: Training, folder: Path) -> None:
    """What another layout saved, into tensors that hold nothing any more."""
    rows = twins.rows_of(training)
    training.memory.restore(training.memory.state(rows), rows)
    for tensor in tensors(training).values():
        local = getattr(tensor, "_local_tensor", tensor)
        local.fill_(math.nan if local.is_floating_point() else -1)
    manager = make_manager(folder, training.world)
    start = manager.start()
    assert start is not None
    manager.load(start, tensors(training))
    training.scale_ahead(training.model)


def tensors(training: Training) -> dict[str, Tensor]:
    """By their names in a checkpoint."""
    remembered = training.memory.state(twins.rows_of(training))
    return (
        model_tensors(training.model)
        | optimizer_tensors(training.model, training.optimizer)
        | memory_tensors(training.memory, remembered, training.world.mesh)
    )
