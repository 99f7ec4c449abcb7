"""Every choice of the registry under tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.combinations.covering import Covering
from tests.distributed.pool import WorkerPool
from tests.parallel.features import ABSENT_HERE, SHARDS, Features, technique

pytestmark = pytest.mark.usefixtures("cpu_alone")
DEGREE = technique("parallelism.tensor_parallel_degree", split={"tensor_parallel_degree": 2})
REFUSED = ABSENT_HERE | {
    # Its micro-batches would be others with tensor parallelism.
    ("model.ffn.query_norm", "batch"),
    ("model.ffn.query_norm.decay", "default"),
    ("model.ffn.query_norm.decay", "0.1"),
    # Its summaries are of whole segments, of which a rank has some of the tokens.
    ("model.memory", "long_term"),
}


@pytest.fixture(scope="module")
def split(level_files: Path) -> Features:
    return Features(DEGREE, "split", level_files)


@pytest.fixture(scope="module")
def covering(split: Features) -> Covering:
    return split.covering()


def test_only_what_cannot_be_split_is_refused(split: Features, covering: Covering) -> None:
    assert split.refused(covering) == REFUSED


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models_equal_those_of_one_process(split: Features, covering: Covering, pool2: WorkerPool, shard: int) -> None:
    failures = split.failures(covering, shard, pool2)
    assert not failures, "\n".join(failures)
