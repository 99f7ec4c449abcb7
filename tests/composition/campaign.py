"""All jobs of the arrays, tried one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.combinations.covering import Covering
from tests.combinations.covering import Pair as Settings
from tests.combinations.factors import Row, write_files
from tests.composition.array import Array, arrays, pair, tolerance_of
from tests.composition.case import Outcome, compared
from tests.composition.techniques import DIM, KIND, LAYOUT
from tests.distributed.pool import WorkerPool

Known = Callable[[str, Row], Outcome | None]
Tell = Callable[[str, Row, Outcome], None]


class Campaign(NamedTuple):
    """What came of an array."""

    array: Array
    outcomes: list[tuple[Row, Outcome]]
    refused: Mapping[Settings, str]
    """Settings that no job has together: why."""


def run(folder: Path, known: Known, tell: Tell) -> Iterator[Campaign]:
    """Every array. `known` says what was found before, if it was; `tell` is told what is found now."""
    write_files(folder, DIM)
    pools = {ranks: WorkerPool(ranks) for ranks in (2, 4)}
    try:
        for array in arrays():
            covering, outcomes = array.covered(folder), []
            for index, row in enumerate(covering.rows):
                outcome = known(array.name, row)
                if outcome is None:
                    outcome = tried(array, row, pools, folder, folder / f"{array.name}-{index}")
                    tell(array.name, row, outcome)
                outcomes.append((row, outcome))
            yield Campaign(array, outcomes, refusals(array, covering, folder))
    finally:
        for pool in pools.values():
            pool.close()


def tried(array: Array, row: Row, pools: Mapping[int, WorkerPool], files: Path, folder: Path) -> Outcome:
    """What comes of one job; an error is a failure. `folder` is for its checkpoints."""
    try:
        return compared(pair(row, array.factors, files), pools, folder, tolerance_of(row))
    except Exception as error:
        said = str(error).partition("\n--- log of rank")[0]  # which a worker pool adds
        return Outcome({}, [f"{type(error).__name__}: {said[-1500:]}"])


def refusals(array: Array, covering: Covering, folder: Path) -> dict[Settings, str]:
    """{settings that no job has together: why}; a layout of one kind is none of another."""
    pairs = [pair for pair in covering.impossible if {pair[0][0], pair[1][0]} != {KIND, LAYOUT}]
    return {settings: array.reason(settings, folder) for settings in pairs}
