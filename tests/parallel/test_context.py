"""Context parallelism, alone and with FSDP, HSDP and tensor parallelism, trains as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor import GAINS, LATENT, MOE, go_on, tables
from titan_lite.models.row import Row
from titan_lite.parallel.ring import AllGather, AllToAll
from titan_lite.parallel.row import SplitRow, ops

GATHER = {"context_parallel_degree": 2}
PASS = {"context_parallel_degree": 2, "context_parallel_rotate_method": "alltoall"}
ULYSSES = {"context_parallel_degree": 2, "context_parallel_method": "ulysses"}
METHODS = {"gather": GATHER, "pass": PASS, "ulysses": ULYSSES}
FOUR = {"context_parallel_degree": 4}
NEXT = {"context_parallel_load_balancer": "none"}
WRITTEN_OUT = {
    "attention": {
        "masks": ["causal", "document", {"type": "sliding_window", "window": 5}],
        "position": "alibi",
        "score": {"type": "softmax_capped", "cap": 2.0},
        "sink": "logit",
        "registers": {"type": "learned", "n": 2},
        "dropout": 0.2,
    },
    "residual": {"dropout": 0.1},
    "embedding": {"dropout": 0.1},
}
"""What flash attention does not compute, and what depends on the numbers of tokens and heads."""
AHEAD = {"mtp": {"type": "modules", "depth": 2}}
COMPILED = {
    "compile": {"enable": True, "backend": "aot_eager"},
    "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
}
WHOLE_BLOCKS = {"activation_checkpoint": {"mode": "full"}}

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallelism, what both runs have, what only the parallel one has
    "gather of scores written out": (2, GATHER, {"model": WRITTEN_OUT}, {}),
    "gather of experts": (2, GATHER, {"model": MOE | AHEAD}, {}),
    "ulysses of what is no softmax": (2, ULYSSES, {"model": MOE | {"attention": {"score": "relu_squared"}}}, {}),
    "gather of latents": (2, GATHER, {"model": {"attention": LATENT, "final_norm": "layernorm"}}, {}),
    "pass among four": (4, PASS | FOUR, {"model": GAINS}, {}),
    "pass among four, undealt": (4, PASS | FOUR | NEXT, {"model": WRITTEN_OUT}, {}),
    "gather among four": (4, GATHER | FOUR, {"model": WRITTEN_OUT}, {}),
    "gather among four, undealt": (4, GATHER | FOUR | NEXT, {"model": GAINS}, {}),
    "fewer key/value heads than ranks": (4, ULYSSES | FOUR, {"model": GAINS}, {}),
    "pass x tp": (4, PASS | {"tensor_parallel_degree": 2}, {"model": WRITTEN_OUT | MOE}, {}),
    "ulysses x tp": (4, ULYSSES | {"tensor_parallel_degree": 2}, {"model": WRITTEN_OUT | MOE | AHEAD}, {}),
    "pass x fsdp": (4, PASS, {"model": {"head": {"tied": True}}, "training": {"z_loss": 1e-2}}, {}),
    "gather x replicas": (
        4,
        GATHER | {"data_parallel_replicate_degree": 2},
        {"training": {"loss_chunk_tokens": 0}},
        {},
    ),
    "pass recomputed": (2, PASS, {}, WHOLE_BLOCKS),
    "gather recomputed per op": (2, GATHER, {}, {"activation_checkpoint": COMPILED["activation_checkpoint"]}),
    "pass compiled": (2, PASS, {"model": {"n_layers": 1} | GAINS}, COMPILED),
    # A rank that sees no other keeps step with those that do, in forward, backward and recomputation.
    "pass compiled, undealt": (2, PASS | NEXT, {"model": {"n_layers": 1}}, COMPILED | WHOLE_BLOCKS),
    "gather compiled, undealt": (2, GATHER | NEXT, {"model": {"n_layers": 2}}, COMPILED | WHOLE_BLOCKS),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, pool2: WorkerPool, pool4: WorkerPool) -> None:
    case = twins.Case(*CASES[name])
    twins.assert_equals_one_process(
        case, tables(**case.both), tables(**case.sections, parallelism=case.parallelism), pool2, pool4
    )


# ---- what is not training


@pytest.mark.parametrize("method", METHODS)
def test_validation_and_sampling(pool2: WorkerPool, method: str) -> None:
    several = tables(model=WRITTEN_OUT, parallelism=METHODS[method])
    twins.assert_continues_alike(tables(model=WRITTEN_OUT), several, pool2)


def test_checkpoints_go_on_in_other_layouts(pool2: WorkerPool, pool4: WorkerPool, tmp_path: Path) -> None:
    one = [go_on(tables(), tmp_path / "one", step) for step in (0, 2, 4)]
    layouts = ((pool2, PASS), (pool4, ULYSSES | {"tensor_parallel_degree": 2}), (pool2, {}))
    several = [
        pool.run(go_on, tables(parallelism=layout), tmp_path / "several", step, timeout=200)[0]
        for step, (pool, layout) in zip((0, 2, 4), layouts, strict=True)
    ]
    torch.testing.assert_close(several, one, rtol=5e-5, atol=0)


# ---- the tests would notice


def broken(sections: dict[str, Any], mutant: str) -> twins.Steps:
    with pytest.MonkeyPatch.context() as patch:
        if mutant == "keys go round the other way":
            patch.setattr(SplitRow, "passing", passing_back)
        if mutant == "gradients of keys stay where they were made":
            patch.setattr(AllToAll, "_of_seen", lambda self, kv, source, of: 0 * of_seen(self, kv, source, of))
        if mutant == "a rank misses the tokens between its chunks":
            patch.setattr(AllGather, "_stretches", lambda self, n: list(stretches(self, n))[:1])
        if mutant == "positions are those of one rank":
            patch.setattr(SplitRow, "own", lambda self, x, dim=1: x.chunk(2)[0] if dim == 0 else own(self, x, dim))
        if mutant == "balance is of a rank's tokens":
            patch.setattr(SplitRow, "sum", Row.sum)
        return twins.steps(sections, 1)


of_seen, stretches, own = AllToAll._of_seen, AllGather._stretches, SplitRow.own


def passing_back(self: SplitRow, x: torch.Tensor) -> torch.Tensor:
    """A ring of the wrong offset: -1 in place of 1."""
    flat = x.contiguous().view(-1)
    sent, received = [0] * self.size, [0] * self.size
    sent[(self.rank - 1) % self.size] = received[(self.rank + 1) % self.size] = flat.numel()
    return ops.all_to_all_single(flat, received, sent, self.group)


@pytest.mark.parametrize(
    ("mutant", "ranks", "layout"),
    [
        ("keys go round the other way", 4, PASS | FOUR),
        ("gradients of keys stay where they were made", 2, PASS),
        ("a rank misses the tokens between its chunks", 4, GATHER | FOUR),
        ("positions are those of one rank", 2, ULYSSES),
        ("balance is of a rank's tokens", 2, ULYSSES),
    ],
)
def test_mutants_differ(mutant: str, ranks: int, layout: dict[str, Any], pool2: WorkerPool, pool4: WorkerPool) -> None:
    one = twins.steps(tables(model=MOE), 1)
    pool = {2: pool2, 4: pool4}[ranks]
    assert twins.differences(one, pool.run(broken, tables(model=MOE, parallelism=layout), mutant, timeout=200)[0])
