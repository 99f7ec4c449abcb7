"""What ranks with different experts send each other in a step is what theory says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor_communication import Collectives
from titan_lite.step import mean_loss

L, D, E, K = 2, 32, 8, 2
TOKENS = twins.ROWS * twins.T
PEER = {"type": "peer", "n_keys": 8, "n_heads": 2, "top_k": 4, "query_dim": 16}


def of_a_micro_batch(ffn: dict[str, Any], mode: dict[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    tables = {
        "model": {"dim": D, "n_layers": L, "attention": {"n_heads": 4}, "ffn": ffn},
        "training": {"seq_len": twins.T, "mixed_precision_param": "float32"},
        "tokenizer": {"type": "bytes"},
        "activation_checkpoint": mode,
        "parallelism": {"expert_parallel_degree": 2},
    }
    training = twins.built(tables)
    with Collectives() as found:
        training.world.forward_backward(
            training.model, [lambda model: mean_loss(training, twins.share(training, 0), 1.0, 0)], last=0
        )
    functional = [name for name in found.counts if name.startswith("tp")]  # FSDP's are not
    return (
        {name[3:]: found.counts[name] for name in functional},
        {name[3:]: found.elements[name] for name in functional},
    )


@pytest.mark.parametrize(
    ("mode", "again"),
    [({"mode": "none"}, 0), ({"mode": "full"}, 1), ({"mode": "selective", "selective_ac_option": "op"}, 0)],
    ids=["kept", "recomputed", "recomputed per op"],
)
def test_tokens_travel_twice_each_way(mode: dict[str, str], again: int, pool2: WorkerPool) -> None:
    ffn = {"type": "moe", "n_experts": E, "top_k": K, "experts": {"hidden": 16}}
    results = pool2.run(of_a_micro_batch, ffn, mode, timeout=200)
    for counts, _ in results:
        # Forward: how many tokens come, the tokens, and what experts made of them. Backward: the latter two.
        assert counts == {"all_to_all_single": L * (3 + 2 + 3 * again)}
    received = sum(elements["all_to_all_single"] for _, elements in results)  # of itself, too
    assert received == L * (2 * (2 + again) * TOKENS * K * D + (1 + again) * 2 * E)


def test_tokens_of_one_neuron_experts_go_everywhere(pool2: WorkerPool) -> None:
    n, choices = 2, 2 * 4
    for counts, elements in pool2.run(of_a_micro_batch, PEER, {"mode": "none"}, timeout=200):
        # Forward: tokens, their experts and weights; what came of them. Backward: the same without the experts.
        assert counts == {"all_gather_into_tensor": L * (3 + 1), "reduce_scatter_tensor": L * (1 + 2)}
        assert elements["all_gather_into_tensor"] == L * TOKENS * (2 * D + 2 * choices)
        assert elements["reduce_scatter_tensor"] == L * TOKENS // n * (2 * D + choices)
