"""Every choice of the registry under context parallelism: equal to one process, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.combinations.covering import Covering
from tests.combinations.factors import Factor, Level, factors, tables_of, write_files
from tests.combinations.refusals import refused
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_context import PASS, ULYSSES
from tests.parallel.test_tensor_features import EachOnce, text_of

METHOD = Factor(
    "parallelism.context_parallel_degree",
    ("parallelism",),
    "",
    (Level("ring", PASS, frozenset()), Level("ulysses", ULYSSES, frozenset())),
    frozenset(),
)
REFUSED = {
    ("model.attention.kernel", "flash_attn"),
    ("model.attention.kernel", "flex"),
    # It normalises over all tokens of a micro-batch, of which a rank has some.
    ("model.ffn.query_norm", "batch"),
    ("model.ffn.query_norm.decay", "default"),
    ("model.ffn.query_norm.decay", "0.1"),
    # Rows leave their newest tokens to the next step, of which a rank has some.
    *(("model.memory", memory) for memory in ("xl", "long_term")),
    *((f"model.memory.{key}", value) for key in ("reset_on_bos", "recompute_kv") for value in ("default", "True")),
}
NO_SOFTMAX = {
    *(("model.attention.score", score) for score in ("elu", "relu_squared")),
    *(("model.attention.score.normalize", value) for value in ("default", "True")),
}
"""Parts of it cannot be merged: for Ulysses."""
SHARDS = 2
"""Tests over which the models are spread."""


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
    return {key: factor for key, factor in factors().items() if key != "model.param_dtype"} | {METHOD.key: METHOD}


def covering_of(method: str, folder: Path) -> Covering:
    known = known_factors()
    return EachOnce(known, lambda row: refused(row, known, folder)).run((METHOD.key, method))


@pytest.fixture(scope="module")
def ring(folder: Path) -> Covering:
    return covering_of("ring", folder)


def refused_with(covering: Covering) -> set[tuple[str, str]]:
    return {other for pair in covering.impossible for other in pair if other[0] != METHOD.key}


def test_only_what_cannot_be_spread_is_refused(ring: Covering, folder: Path) -> None:
    """And what this machine lacks."""
    assert refused_with(covering_of("ulysses", folder)) == REFUSED
    assert refused_with(ring) == REFUSED | NO_SOFTMAX


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models_equal_those_of_one_process(ring: Covering, folder: Path, pool2: WorkerPool, shard: int) -> None:
    known = known_factors()
    failures = []
    for row in ring.rows[shard::SHARDS]:
        tables = tables_of(row, known, folder)
        spread = pool2.run(twins.steps, tables, timeout=200)[0]
        del tables["parallelism"]
        if found := twins.differences(twins.steps(tables), spread):
            failures.append(f"{found[:5]}\n  in the model with {text_of(row)}")
    assert not failures, "\n".join(failures)
