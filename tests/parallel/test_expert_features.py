"""Every choice of the registry with experts over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.combinations.covering import Covering
from tests.distributed.pool import WorkerPool
from tests.parallel.features import ABSENT_HERE, SHARDS, Features, technique

pytestmark = pytest.mark.usefixtures("cpu_alone")
DEGREE = technique("parallelism.expert_parallel_degree", spread={"expert_parallel_degree": 2})
REFUSED = ABSENT_HERE | {
    # Networks without experts, and what there is of them alone.
    *(("model.ffn", name) for name in ("clamped_swiglu", "glu", "glu_scaled", "mlp")),
    ("model.ffn.activation", "gelu"),
    *(("model.ffn.bias", value) for value in ("default", "True")),
    # nGPT has no experts at all.
    ("model.linear", "unit"),
    ("model.residual", "ngpt"),
}


@pytest.fixture(scope="module")
def spread(level_files: Path) -> Features:
    return Features(DEGREE, "spread", level_files)


@pytest.fixture(scope="module")
def covering(spread: Features) -> Covering:
    return spread.covering()


def test_only_what_has_no_experts_is_refused(spread: Features, covering: Covering) -> None:
    assert spread.refused(covering) == REFUSED


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models_equal_those_of_one_process(spread: Features, covering: Covering, pool2: WorkerPool, shard: int) -> None:
    failures = spread.failures(covering, shard, pool2)
    assert not failures, "\n".join(failures)
