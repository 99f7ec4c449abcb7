"""Every choice of the registry beside one way to divide the work: equal to one process, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tests.combinations.covering import Covering, Setting
from tests.combinations.factors import ABSENT, Factor, Level, Row, factors, tables_of
from tests.combinations.refusals import refused
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from titan_lite.parallel.config import Parallelism

RANKS = 2
SHARDS = 2
"""Tests over which the models are spread."""
ABSENT_HERE = {("model.attention.kernel", "flash_attn"), ("model.attention.kernel", "flex")}
"""What this machine lacks."""


class Features(NamedTuple):
    """The models in which every choice stands that goes with `technique`."""

    factor: Factor
    technique: str
    """A level of the factor."""
    folder: Path
    """Files of `write_files`."""

    @property
    def known(self) -> dict[str, Factor]:
        """All but stored dtypes, whose one process needs FSDP to cast: see test_tensor.py."""
        found = {key: factor for key, factor in factors().items() if key != "model.param_dtype"}
        return found | {self.factor.key: self.factor}

    def covering(self) -> Covering:
        """Rows in which every setting appears that can, all with the technique."""
        known, technique = self.known, (self.factor.key, self.technique)
        everything = Covering(known, lambda row: refused(row, known, self.folder))
        return everything.run(lambda one, other: technique in (one, other))

    def refused(self, covering: Covering) -> set[Setting]:
        """What goes with the technique in no model."""
        return {other for pair in covering.impossible for other in pair if other[0] != self.factor.key}

    def around(self, slot: str, without: str) -> set[Setting]:
        """What stands in a slot but for one choice, and all keys in the slot's table."""
        settings = {(key, level.name) for key, factor in self.known.items() for level in factor.levels}
        inside = {setting for setting in settings if setting[0].startswith(f"{slot}.")}
        return inside | {(key, name) for key, name in settings if key == slot and name != without}

    def failures(self, covering: Covering, shard: int, pool: WorkerPool) -> list[str]:
        """Models of a shard that differ on a pool of RANKS from those of one process, and where."""
        found = []
        for row in covering.rows[shard::SHARDS]:
            tables = tables_of(row, self.known, self.folder)
            tables["training"]["local_batch_size"] = twins.ROWS
            several = pool.run(twins.steps, tables, timeout=200)[0]
            if differences := twins.differences(twins.steps(alone(tables, row)), several):
                found.append(f"{differences[:5]}\n  in the model with {self.text_of(row)}")
        return found

    def text_of(self, row: Row) -> str:
        """What is not the default."""
        first = {key: factor.levels[0].name for key, factor in self.known.items()}
        return ", ".join(f"{key}={name}" for key, name in row.items() if name not in (first[key], ABSENT))


def technique(key: str, **levels: dict[str, Any]) -> Factor:
    """A factor whose levels are tables of [parallelism]; refusals name it by `key`."""
    made = tuple(Level(name, table, frozenset()) for name, table in levels.items())
    return Factor(key, ("parallelism",), "", made, frozenset())


def alone(tables: dict[str, Any], row: Row) -> dict[str, Any]:
    """The job in one process; in as many micro-batches where there are statistics over them."""
    one = {name: table for name, table in tables.items() if name != "parallelism"}
    layout = Parallelism(**tables["parallelism"])
    groups = layout.data_parallel_degree(RANKS)
    assert groups is not None
    rows = 1 if layout.pipeline_parallel_degree > 1 else twins.ROWS // groups
    return one | {"training": one["training"] | {"local_batch_size": rows if cut_matters(row) else twins.ROWS}}


def cut_matters(row: Row) -> bool:
    """Whether the row has statistics over a micro-batch; its config warns of them."""
    return row["model.ffn.query_norm"] == "batch" or "micro_batch" in row["model.ffn.balance"]
