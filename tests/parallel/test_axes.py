"""Context, pipeline, expert and tensor parallelism together train as one process does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_expert import CLAMPED, FULL, PEER
from tests.parallel.test_tensor import GAINS, go_on, tables

CP, ULYSSES = {"context_parallel_degree": 2}, {"context_parallel_degree": 2, "context_parallel_method": "ulysses"}
PASS = CP | {"context_parallel_rotate_method": "alltoall"}
PP, TP, EP = {"pipeline_parallel_degree": 2}, {"tensor_parallel_degree": 2}, {"expert_parallel_degree": 2}
ETP = TP | {"expert_tensor_parallel_degree": 2}
ZBV = PP | {"pipeline_parallel_schedule": "ZBVZeroBubble"}
INTERLEAVED = PP | {"pipeline_parallel_schedule": "Interleaved1F1B"}
VALUES = {"attention": {"value_mix": "residual"}}
TIED = {"head": {"tied": True}}
AHEAD = {"mtp": {"type": "modules", "depth": 2, "reads": "normed"}}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: parallelism, model
    "cp x pp": (CP | ZBV, GAINS | VALUES),
    "cp x pp, tied, further tokens": (PASS | PP, TIED | AHEAD),
    "ulysses x pp": (ULYSSES | INTERLEAVED, VALUES),
    "cp x ep": (CP | EP, {"ffn": FULL}),
    "cp x ep over both": (PASS | {"expert_parallel_degree": 4}, {"ffn": CLAMPED | {"balance": ["sequence"]}}),
    "cp x ep of neurons": (CP | EP, {"ffn": PEER}),
    "pp x ep": (PP | EP, {"ffn": FULL}),
    "pp x ep in two halves": (ZBV | EP, {"ffn": CLAMPED}),
    "pp x ep over tp": (PP | TP | EP, {"ffn": FULL}),
    "pp x ep within tp": (PP | ETP, {"ffn": CLAMPED}),
    "cp x tp x ep": (CP | ETP | EP, {"ffn": FULL}),
}
"""On four ranks; data-parallel ones take what is left."""
LARGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp x pp x tp": (INTERLEAVED | TP, GAINS | TIED),
    "dp x cp x tp": (CP | TP, GAINS),
    "dp x cp x pp": (PASS | PP, VALUES),
    "cp x pp x tp": (CP | ZBV | TP, GAINS | VALUES),
    "replicas x cp x tp": (CP | TP | {"data_parallel_replicate_degree": 2}, GAINS),
    "dp x cp x ep": (CP | {"expert_parallel_degree": 4}, {"ffn": FULL}),
    "replicas x cp x ep": (CP | EP | {"data_parallel_replicate_degree": 2}, {"ffn": CLAMPED}),
    "dp x pp x ep": (PP | EP, {"ffn": FULL}),
    "cp x pp x ep x tp": (CP | PP | TP | {"expert_parallel_degree": 4}, {"ffn": FULL}),
    "cp x pp x ep x etp": (CP | PP | ETP | EP, {"ffn": CLAMPED}),
}
"""On eight ranks."""
RESUMED_RTOL = 5e-5
"""Eight steps of AdamW, which makes steps of the rounding of tiny gradients."""


def job(parallelism: dict[str, Any], model: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Of four layers; each rank's share of the rows is one micro-batch, or what goes through a pipeline at a time."""
    degrees = [parallelism.get(f"{axis}_parallel_degree", 1) for axis in ("context", "pipeline", "tensor")]
    share = {"local_batch_size": twins.ROWS * math.prod(degrees) // ranks}
    return tables(model={"n_layers": 4} | model, parallelism=parallelism, training=share)


def compare(parallelism: dict[str, Any], model: dict[str, Any], pool: WorkerPool) -> None:
    one = twins.steps(job({}, model))
    for several in pool.run(twins.steps, job(parallelism, model, pool.n), timeout=280):
        assert not twins.differences(one, several)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, pool4: WorkerPool) -> None:
    compare(*CASES[name], pool4)


@pytest.fixture(scope="module")
def pool8() -> Iterator[WorkerPool]:
    pool = WorkerPool(8)
    yield pool
    pool.close()


@pytest.mark.campaign
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LARGE)
def test_equals_one_process_on_eight_ranks(name: str, pool8: WorkerPool) -> None:
    compare(*LARGE[name], pool8)


def test_checkpoints_go_on_in_other_layouts(pool4: WorkerPool, tmp_path: Path) -> None:
    model = {"ffn": FULL, "head": {"tied": True}}
    layouts = (CP | PP, PP | TP | EP, CP | ETP | EP, PP | EP)
    one = [go_on(job({}, model), tmp_path / "one", step) for step in (0, 2, 4, 6)]
    several = [
        pool4.run(go_on, job(layout, model, 4), tmp_path / "several", step, timeout=200)[0]
        for step, layout in zip((0, 2, 4, 6), layouts, strict=True)
    ]
    torch.testing.assert_close(several, one, rtol=RESUMED_RTOL, atol=0)
