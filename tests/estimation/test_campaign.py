"""Estimated peak memory over a covering array of configs: every pair of a layout, a feature, a checkpoint mode, an
optimizer, a loss and a precision meets in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.estimation.judge import measured_peak
from tests.estimation.test_accuracy import (
    ALIBI,
    CHUNKED,
    DDP,
    DROPOUT,
    EXPERTS,
    FOREACH,
    FULL,
    LOOP,
    MIXED,
    OP,
    POST,
    SECOND,
    SHARED,
    TIED,
    TOLERANCE,
    TP,
    estimated_peak,
    tables_of,
)

Change = Mapping[str, Any]

PARALLEL = {"model": {"block": {"type": "parallel"}}}
MLP = {"model": {"norm": {"type": "layernorm"}, "ffn": {"type": "mlp"}}}

FACTORS: dict[str, dict[str, list[Change]]] = {
    "layout": {"alone": [], "sharded": [], "replicas": [DDP], "tp": [TP], "tp of shards": [TP], "hybrid": [DDP]},
    "feature": {
        "plain": [],
        "tied": [TIED],
        "experts": [EXPERTS],
        "shared": [SHARED],
        "dropout": [DROPOUT],
        "alibi": [ALIBI],
        "post": [POST],
        "parallel": [PARALLEL],
        "mlp": [MLP],
    },
    "checkpoint": {"none": [], "full": [FULL], "op": [OP], "second": [SECOND]},
    "optimizer": {"fused": [], "foreach": [FOREACH], "for-loop": [LOOP]},
    "loss": {"dense": [], "chunked": [CHUNKED]},
    "precision": {"float32": [], "mixed": [MIXED]},
}
SIZES = {"alone": 1, "sharded": 2, "replicas": 2, "tp": 2, "tp of shards": 4, "hybrid": 4}

Names = tuple[str, ...]


def covering(levels: Sequence[Sequence[str]]) -> Iterator[Names]:
    """Rows in which each two levels of different factors meet: always the row with most pairs that have not met."""
    missing = {
        pair
        for a, b in itertools.combinations(range(len(levels)), 2)
        for pair in itertools.product([(a, level) for level in levels[a]], [(b, level) for level in levels[b]])
    }
    rows = {row: _pairs(row) for row in itertools.product(*levels)}
    while missing:
        best = max(rows, key=lambda row: len(rows[row] & missing))
        missing -= rows[best]
        yield best


def _pairs(row: Names) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return set(itertools.combinations(enumerate(row), 2))


ROWS = list(covering([list(levels) for levels in FACTORS.values()]))


def test_each_pair_meets():
    assert len(ROWS) >= 40
    wanted = [(FACTORS[a], FACTORS[b]) for a, b in itertools.combinations(FACTORS, 2)]
    assert len(set().union(*map(_pairs, ROWS))) == sum(len(a) * len(b) for a, b in wanted)


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", ROWS, ids=", ".join)
def test_a_row(row: Names, request: pytest.FixtureRequest):
    changes = [change for levels, name in zip(FACTORS.values(), row, strict=True) for change in levels[name]]
    tables, size = tables_of(changes), SIZES[row[0]]
    estimated = estimated_peak(tables, size)
    if size == 1:
        measured = measured_peak(tables, 1)
    else:
        pool: WorkerPool = request.getfixturevalue(f"pool{size}")
        measured = min(pool.run(measured_peak, tables, size))
    print(f"{', '.join(row)}: {estimated / measured:.4f}")
    assert estimated == pytest.approx(measured, rel=TOLERANCE)
