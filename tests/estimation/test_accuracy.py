"""Estimated peak memory equals what the allocator gives out in a real step, in one process and over two ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from estimation.memory import memory_of
from estimation.rehearsal import rehearse
from tests.distributed.pool import WorkerPool
from tests.estimation.judge import VOCAB, measured_peak
from titan_lite.config.load import job_from_dict
from titan_lite.config.merge import Layer, merged
from titan_lite.job import Job

TOLERANCE = 0.02

BASE: dict[str, Any] = {
    "model": {"dim": 128, "n_layers": 3, "vocab_size": VOCAB},
    "training": {"local_batch_size": 2, "seq_len": 128, "loss_chunk_tokens": 0, "mixed_precision_param": "float32"},
    "activation_checkpoint": {"mode": "none"},
}
FULL = {"activation_checkpoint": {"mode": "full"}}
OP = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
SECOND = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
ACCUMULATING = {"training": {"global_batch_size": 16}}
CHUNKED = {"training": {"loss_chunk_tokens": 64}}
FOREACH = {"optimizer": {"implementation": "foreach"}}
LOOP = {"optimizer": {"implementation": "for-loop"}}
MIXED = {"training": {"mixed_precision_param": "bfloat16"}}
TIED = {"model": {"head": {"tied": True}}}
TP = {"parallelism": {"tensor_parallel_degree": 2}}
DDP = {"parallelism": {"data_parallel_replicate_degree": 2}}
EXPERTS = {"model": {"name": "mixtral", "flavor": "debugmodel"}}
SPREAD = {"parallelism": {"expert_parallel_degree": 2}, "debug": {"moe_force_load_balance": True}}
XL = {"model": {"memory": {"type": "xl", "length": 64}}}
SHARED = {"model": {"n_layers": 4, "stack": {"type": "shared", "share": "cycle", "n_unique": 2}}}
DROPOUT = {"model": {"residual": {"type": "pre", "dropout": 0.1}}}
ALIBI = {"model": {"attention": {"position": {"type": "alibi"}}}}
POST = {"model": {"residual": {"type": "post"}, "norm": {"type": "layernorm"}}}
EAGER = {"model": {"attention": {"kernel": "eager"}}}
REWARD = {
    "model": {"head": {"reward": {"type": "linear"}}},
    "objective": {"type": "reward"},
    "data": {"source": {"type": "pairs", "path": "pairs.jsonl"}},
}

ALONE = {
    "plain": [],
    "full": [FULL, CHUNKED],
    "op": [OP, TIED],
    "second, accumulating": [SECOND, ACCUMULATING],
    "foreach": [FULL, FOREACH],
    "for-loop, chunked": [OP, LOOP, CHUNKED],
    "alibi, dropout": [ALIBI, DROPOUT],
    "post, eager": [POST, EAGER],
    "shared": [SHARED, FULL],
    "memory": [XL],
    "experts": [EXPERTS],
    "rewards": [REWARD, FULL],
}
# Not accumulating: of many collectives in a row gloo's threads nearly always hold one more (see judge.py).
SEVERAL = {
    "sharded": [],
    "sharded, full, chunked": [FULL, CHUNKED],
    "sharded, op, foreach": [OP, FOREACH],
    "sharded, second, tied": [TIED, SECOND],
    "replicas": [DDP, FULL],
    "tensor parallel": [TP],
    "tensor parallel, op": [TP, OP, CHUNKED],
    "rewards": [TP, REWARD],
    "shared": [SHARED],
    "experts over ranks": [EXPERTS, SPREAD],
}
FOUR = {
    "sharded, tensor parallel, op": [TP, OP],
    "replicas of shards": [DDP],
}


def tables_of(changes: list[Mapping[str, Any]]) -> dict[str, Any]:
    return merged([Layer(dict(BASE)), *(Layer(dict(change)) for change in changes)], Job).tables


def estimated_peak(tables: Mapping[str, Any], size: int) -> int:
    return memory_of(rehearse(job_from_dict(tables, size, files=False), size, on_device=False).trace).peak.total


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name: str):
    tables = tables_of(ALONE[name])
    assert estimated_peak(tables, 1) == pytest.approx(measured_peak(tables, 1), rel=TOLERANCE)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_ranks(name: str, pool2: WorkerPool):
    tables = tables_of(SEVERAL[name])
    measured = min(pool2.run(measured_peak, tables, 2))
    assert estimated_peak(tables, 2) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str, pool4: WorkerPool):
    tables = tables_of(FOUR[name])
    measured = min(pool4.run(measured_peak, tables, 4))
    assert estimated_peak(tables, 4) == pytest.approx(measured, rel=TOLERANCE)
