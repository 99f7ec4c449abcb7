"""What context-parallel ranks send each other in a micro-batch is what theory says, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks.collectives import Collective, Collectives
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_context import GATHER, PASS, ULYSSES
from titan_lite.step import mean_loss

L, H, G, DH = 4, 8, 4, 16
"""The debugmodel of the llama3 preset."""
BF16, FP32 = 2, 4
"""Bytes of a number: keys and values are in the one, their gradients are added up in the other."""
FUNCTIONAL = {"all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce"}
"""FSDP's collectives have other names."""


def of_a_micro_batch(parallelism: dict[str, Any]) -> Counter[Collective]:
    tables = {
        "model": {"name": "llama3", "flavor": "debugmodel", "vocab_size": twins.VOCAB},
        "training": {"seq_len": twins.T, "mixed_precision_param": "bfloat16"},
        "tokenizer": {"type": "bytes"},
        "activation_checkpoint": {"mode": "none"},
        "parallelism": parallelism,
    }
    training = twins.built(tables)
    with Collectives() as found:
        training.world.forward_backward(
            training.model, [lambda model: mean_loss(training, twins.share(training, 0), 1.0, 0)], last=0
        )
    return Counter(call for call in found.calls if call.kind in FUNCTIONAL)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("method", ["gather", "pass", "ulysses"])
def test_collectives(method: str, n: int, pool2: WorkerPool, pool4: WorkerPool) -> None:
    """What a rank gives to each, in bytes; forward and backward of each layer."""
    tokens = twins.ROWS * twins.T // n  # of a rank
    own = tokens * G * 2 * DH
    expected: dict[str, Counter[Collective]] = {
        "gather": Counter(
            {
                Collective("all_gather_into_tensor", own * BF16, n): 2 * L,
                Collective("reduce_scatter_tensor", n * own * FP32, n): L,
            }
        ),
        "pass": Counter(
            {
                Collective("all_to_all_single", own * BF16, n): 2 * L * (n - 1),
                Collective("all_to_all_single", own * FP32, n): L * (n - 1),
            }
        ),
        "ulysses": Counter(
            {
                Collective("all_to_all_single", tokens * (H + 2 * G) * DH * BF16, n): 2 * L,
                Collective("all_to_all_single", tokens * H * DH * BF16, n): 2 * L,
            }
        ),
    }
    layout = {"gather": GATHER, "pass": PASS, "ulysses": ULYSSES}[method] | {"context_parallel_degree": n}
    for found in {2: pool2, 4: pool4}[n].run(of_a_micro_batch, layout, timeout=200):
        assert found == expected[method]
