"""Every choice of the registry under context parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.combinations.covering import Covering
from tests.distributed.pool import WorkerPool
from tests.parallel.features import ABSENT_HERE, SHARDS, Features, technique
from tests.parallel.test_context import PASS, ULYSSES

pytestmark = pytest.mark.usefixtures("cpu_alone")
METHOD = technique("parallelism.context_parallel_degree", ring=PASS, ulysses=ULYSSES)
REFUSED = ABSENT_HERE | {
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


@pytest.fixture(scope="module")
def ring(level_files: Path) -> Features:
    return Features(METHOD, "ring", level_files)


@pytest.fixture(scope="module")
def covering(ring: Features) -> Covering:
    return ring.covering()


def test_only_what_cannot_be_spread_is_refused(ring: Features, covering: Covering) -> None:
    ulysses = ring._replace(technique="ulysses")
    assert ulysses.refused(ulysses.covering()) == REFUSED
    assert ring.refused(covering) == REFUSED | NO_SOFTMAX


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models_equal_those_of_one_process(ring: Features, covering: Covering, pool2: WorkerPool, shard: int) -> None:
    failures = ring.failures(covering, shard, pool2)
    assert not failures, "\n".join(failures)
