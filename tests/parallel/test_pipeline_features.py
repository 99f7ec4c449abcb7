"""Every choice of the registry in a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.combinations.covering import Covering
from tests.distributed.pool import WorkerPool
from tests.parallel.features import ABSENT_HERE, SHARDS, Features, technique

pytestmark = pytest.mark.usefixtures("cpu_alone")
DEGREE = technique("parallelism.pipeline_parallel_degree", stages={"pipeline_parallel_degree": 2})


@pytest.fixture(scope="module")
def stages(level_files: Path) -> Features:
    return Features(DEGREE, "stages", level_files)


@pytest.fixture(scope="module")
def covering(stages: Features) -> Covering:
    return stages.covering()


def test_only_what_cannot_be_cut_is_refused(stages: Features, covering: Covering) -> None:
    """Blocks that run several times, what is remembered of each layer, and what is measured layer after layer."""
    several, remembered = stages.around("model.stack", "plain"), stages.around("model.memory", "none")
    measured = {("model.residual.start", "default")}
    assert stages.refused(covering) == ABSENT_HERE | several | remembered | measured


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_models_equal_those_of_one_process(stages: Features, covering: Covering, pool2: WorkerPool, shard: int) -> None:
    failures = stages.failures(covering, shard, pool2)
    assert not failures, "\n".join(failures)
