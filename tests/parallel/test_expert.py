"""Experts spread over ranks train as in one process, alone and with every other axis."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor import tables

EP2 = {"expert_parallel_degree": 2}
EP4 = {"expert_parallel_degree": 4}
TP2 = {"tensor_parallel_degree": 2}
ETP2 = TP2 | {"expert_tensor_parallel_degree": 2}
MOE = {"type": "moe", "experts": {"hidden": 16}}
FULL = MOE | {"balance": ["sequence"], "shared_hidden": 24, "offset": "load", "router": "sigmoid"}
CLAMPED = {"type": "moe", "n_experts": 4, "experts": {"type": "clamped_swiglu", "hidden": 16, "bias": True}}
PEER = {"type": "peer", "n_keys": 8, "n_heads": 2, "top_k": 4, "query_dim": 16}

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallelism, what both runs have, what only the parallel one has
    "two ranks": (2, EP2, {"ffn": FULL}, {}),
    "all of fsdp": (4, EP4, {"ffn": CLAMPED}, {}),
    "half of fsdp": (4, EP2, {"ffn": FULL}, {}),
    "half of hsdp": (4, EP2 | {"data_parallel_replicate_degree": 2}, {"ffn": CLAMPED}, {}),
    "tensor ranks too": (4, EP4 | TP2, {"ffn": FULL}, {}),
    "within tensor ranks": (4, EP2 | TP2, {"ffn": CLAMPED}, {}),
    "split experts": (4, EP2 | ETP2, {"ffn": CLAMPED}, {}),
    "split experts alone": (4, ETP2, {"ffn": FULL}, {}),
    "one-neuron experts": (4, EP2, {"ffn": PEER}, {}),
    "one-neuron experts on tensor ranks": (4, EP4 | TP2, {"ffn": PEER}, {}),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, pool2: WorkerPool, pool4: WorkerPool) -> None:
    ranks, parallelism, model, more = CASES[name]
    one = twins.steps(tables(model=model))
    pool = {2: pool2, 4: pool4}[ranks]
    for several in pool.run(twins.steps, tables(model=model, parallelism=parallelism, **more), timeout=200):
        assert not twins.differences(one, several)
