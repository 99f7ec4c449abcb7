"""A schedule in a file: one line per rank, its actions in torch's words (0F0, 1B2, 3I0, 3W0), separated by commas."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from titan_lite.parallel.pipeline.plan import PlanError
from titan_lite.parallel.pipeline.schedule import Table, table_from, timeline

KEY = "pipeline_parallel_schedule_csv"


def read_actions(path: str) -> dict[int, list[Any]]:
    """torch's actions of each rank. Raises PlanError."""
    from torch.distributed.pipelining.schedules import _Action  # slow

    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(KEY, f"cannot be read: {error}", "a file with one line of actions per rank") from None
    try:
        return {rank: [_Action.from_str(word) for word in row] for rank, row in enumerate(rows)}
    except (RuntimeError, ValueError, KeyError) as error:
        raise PlanError(
            KEY, f"is not a schedule: {error}", "actions such as 0F0 (stage 0, forward, micro-batch 0)"
        ) from None


def read_table(path: str, n_ranks: int, n_micro_batches: int) -> Table:
    """The table in the file, checked: it computes everything once, in an order in which no rank waits forever."""
    from torch.distributed.pipelining.schedules import _validate_schedule  # slow

    actions = read_actions(path)
    if len(actions) != n_ranks:
        raise PlanError(KEY, f"has lines for {len(actions)} ranks", f"pipeline_parallel_degree = {len(actions)}")
    found = table_from(actions, 0)
    n_stages = 1 + max((work.stage for works in found.ranks for work in works), default=0)
    table = Table(found.ranks, n_stages)
    allowed = f"every micro-batch from 0 to {n_micro_batches - 1} forward and backward once on each stage, from 0 on"
    try:
        if not all(action is None or action.is_compute_op for row in actions.values() for action in row):
            raise ValueError("it has sends, receives or sharding, which are added to what is computed")
        _validate_schedule(actions, n_ranks, n_stages, n_micro_batches)
        seen = [work for works in table.ranks for work in works]
        if len(set(seen)) < len(seen) or any(work.micro_batch >= n_micro_batches for work in seen):
            raise ValueError("something is computed twice, or a micro-batch is not there")
        timeline(table)
    except (AssertionError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise PlanError(
            KEY, f"does not fit {n_micro_batches} micro-batches on {n_stages} stages: {why}", allowed
        ) from None
    return table
