"""What compiled functions keep: against torch.compile itself, and against what is counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from estimation.fusion import Fused
from estimation.memory import memory_of
from estimation.rehearsal import rehearse
from estimation.trace import Alloc, Tracer, traced
from tests.estimation.judge import CPU, VOCAB, net_bytes
from titan_lite.config.load import job_from_dict
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.step import MicroBatch, build, mean_loss

KEPT_TOLERANCE = 0.02

MODES: dict[str, dict[str, Any]] = {
    "op": {"mode": "selective", "selective_ac_option": "op"},
    "memory budget": {"mode": "memory_budget", "memory_budget": 0.5},
}


def test_checkpoints_over_ranks_keep_what_is_random_on_a_cpu():
    """Fused attention, which a device computes again: its result and log-sum-exp, of each rank's heads."""
    tables: dict[str, Any] = {
        "model": {"dim": 128, "n_layers": 3, "vocab_size": VOCAB, "attention": {"n_heads": 4}},
        "training": {"local_batch_size": 2, "seq_len": 128, "loss_chunk_tokens": 0, "mixed_precision_param": "float32"},
        "activation_checkpoint": {"mode": "full"},
        "compile": {"enable": True, "components": ["model"]},
        "parallelism": {"tensor_parallel_degree": 2},
    }
    job = job_from_dict(tables, 2, files=False)
    here, there = (rehearse(job, 2, on_device=on_device) for on_device in (False, True))
    assert not here.failures
    assert not there.failures
    saved, less = (memory_of(each.trace).saved["stack.blocks.1"] for each in (here, there))
    assert saved - less == pytest.approx(2 * 128 * (128 // 2 + 2) * 4, rel=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_keep_what_torch_compile_keeps(mode: str):
    """Bytes that a compiled forward leaves behind, by the allocator's events."""
    tables: dict[str, Any] = {
        "model": {"dim": 128, "n_layers": 4, "vocab_size": VOCAB},
        "training": {"local_batch_size": 2, "seq_len": 128, "loss_chunk_tokens": 0, "mixed_precision_param": "float32"},
        "activation_checkpoint": MODES[mode],
        "compile": {"enable": True, "components": ["model"], "backend": "aot_eager_decomp_partition"},
    }
    job = job_from_dict(tables, 1, files=False)
    saved = memory_of(rehearse(job, 1, on_device=False).trace).saved
    training = build(job, World(0, 1, CPU), Precision.of(job, CPU), VOCAB)
    tokens = torch.randint(VOCAB, (2, 128))
    batch = MicroBatch(tokens, tokens, torch.zeros_like(tokens), torch.arange(2))
    results: list[Tensor] = []
    mean_loss(training, batch, 256.0, 0)  # compiles
    measured = net_bytes(lambda: results.append(mean_loss(training, batch, 256.0, 0)))
    assert sum(saved.values()) == pytest.approx(measured, rel=KEPT_TOLERANCE)


def test_only_what_a_product_reads_exists():
    """Of a chain of elementwise operations between two products, the last result; and one buffer is written twice."""

    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        return [torch.sin(torch.relu(a @ b) * 2) @ b]

    with FakeTensorMode():
        a, b = torch.empty(64, 64), torch.empty(64, 64)
        graph = Fused(make_fx(function, tracing_mode="fake")(a, b), again=())
        with traced(Tracer(1), {}) as trace:
            graph([a, b])
    made = [event.op for event in trace.events if isinstance(event, Alloc)]
    assert made == ["aten.mm.default", "aten.mm.default"]  # the chain overwrites the first product
