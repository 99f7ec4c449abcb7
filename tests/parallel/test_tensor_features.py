"""Every choice of the registry under tensor parallelism: equal to one process, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.combinations.covering import Covering
from tests.combinations.factors import ABSENT, Factor, Level, factors, tables_of, write_files
from tests.combinations.refusals import refused
from tests.distributed.pool import WorkerPool
from tests.parallel import twins

DEGREE = Factor(
    "parallelism.tensor_parallel_degree",
    ("parallelism", "tensor_parallel_degree"),
    "",
    (Level("2", 2, frozenset()),),
    frozenset(),
)
REFUSED = {
    ("model.attention.kernel", "flash_attn"),
    ("model.attention.kernel", "flex"),
    # Its micro-batches would be others with tensor parallelism.
    ("model.ffn.query_norm", "batch"),
    ("model.ffn.query_norm.decay", "default"),
    ("model.ffn.query_norm.decay", "0.1"),
    # Its summaries are of whole segments, of which a rank has some of the tokens.
    ("model.memory", "long_term"),
}
SHARDS = 2
"""Tests over which the models are spread."""


class EachOnce(Covering):
    """Rows in which every setting appears that can."""

    def run(self, degree: tuple[str, str] = (DEGREE.key, "2")) -> Covering:
        """Beside the level `degree` of a factor."""
        for setting in self.settings:
            if setting[1] != ABSENT and setting != degree:
                self.missing[self.bit[setting]] = self.bit[degree]
                self.missing[self.bit[degree]] |= self.bit[setting]
        while self.missing[self.bit[degree]]:
            other = next(setting for setting in self.settings if self.missing[self.bit[degree]] & self.bit[setting])
            self._cover((other, degree))
        return self


@pytest.fixture(scope="module", autouse=True)
def cpu_alone() -> Iterator[None]:
    """The models run on the CPU, so configs are judged as on a machine without CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_files(path)
    return path


def known_factors() -> dict[str, Factor]:
    """All but stored dtypes, whose one process needs FSDP to cast: see test_tensor.py."""
    return {key: factor for key, factor in factors().items() if key != "model.param_dtype"} | {DEGREE.key: DEGREE}


@pytest.fixture(scope="module")
def covering(folder: Path) -> Covering:
    known = known_factors()
    return EachOnce(known, lambda row: refused(row, known, folder)).run()


def test_only_what_cannot_be_split_is_refused(covering: Covering) -> None:
    """And what this machine lacks."""
    assert {other for pair in covering.impossible for other in pair if other[0] != DEGREE.key} == REFUSED


def text_of(row: dict[str, str]) -> str:
    first = {key: factor.levels[0].name for key, factor in factors().items()} | {DEGREE.key: "2", ABSENT: ""}
    return ", ".join(f"{key}={name}" for key, name in row.items() if name not in (first[key], ABSENT))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models_equal_those_of_one_process(covering: Covering, folder: Path, pool2: WorkerPool, shard: int) -> None:
    known = known_factors()
    failures = []
    for row in covering.rows[shard::SHARDS]:
        tables = tables_of(row, known, folder)
        split = pool2.run(twins.steps, tables, timeout=200)[0]
        del tables["parallelism"]
        if found := twins.differences(twins.steps(tables), split):
            failures.append(f"{found[:5]}\n  in the model with {text_of(row)}")
    assert not failures, "\n".join(failures)
