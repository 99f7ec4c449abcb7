"""Context parallelism trains as one process does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor import tables

CP2 = {"context_parallel_degree": 2}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gather": (2, CP2, {}, {}),
    "pass": (2, CP2 | {"context_parallel_rotate_method": "alltoall"}, {}, {}),
    "ulysses": (2, CP2 | {"context_parallel_method": "ulysses"}, {}, {}),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, pool2: WorkerPool, pool4: WorkerPool) -> None:
    ranks, parallelism, both, more = CASES[name]
    one = twins.steps(tables(**both))
    sections = {key: both.get(key, {}) | more.get(key, {}) for key in both | more}
    pool = {2: pool2, 4: pool4}[ranks]
    for several in pool.run(twins.steps, tables(**sections, parallelism=parallelism), timeout=200):
        assert not twins.differences(one, several)
