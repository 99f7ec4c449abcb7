"""Experts spread over ranks train as in one process, alone and with every other axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import runs
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor import go_on, shards, tables
from titan_lite.models.ffn.moe import MoE
from titan_lite.parallel import apply, expert, tensor

EP2 = {"expert_parallel_degree": 2}
EP4 = {"expert_parallel_degree": 4}
TP2 = {"tensor_parallel_degree": 2}
ETP2 = TP2 | {"expert_tensor_parallel_degree": 2}
REPLICAS = {"data_parallel_replicate_degree": 2}
MOE = {"type": "moe", "experts": {"hidden": 16}}
FULL = MOE | {"balance": ["sequence", "z_loss"], "shared_hidden": 24, "offset": "load", "router": "sigmoid"}
CLAMPED = {"type": "moe", "n_experts": 4, "experts": {"type": "clamped_swiglu", "hidden": 16, "bias": True}}
PEER = {"type": "peer", "n_keys": 8, "n_heads": 2, "top_k": 4, "query_dim": 16}
COMPILED = {"compile": {"enable": True, "backend": "aot_eager", "components": ["model"]}}
PER_OP = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
OFFLOADED = {"training": {"enable_cpu_offload": True}}

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallelism, what both runs have, what only the parallel one has
    "two ranks": (2, EP2, FULL, {}),
    "all of fsdp": (4, EP4, CLAMPED, {}),
    "half of fsdp, an expert a rank": (4, EP2, MOE | {"n_experts": 2}, {}),
    "half of hsdp": (4, EP2 | REPLICAS, CLAMPED, {}),
    "tensor ranks too": (4, EP4 | TP2, FULL, {}),
    "within tensor ranks": (4, EP2 | TP2, CLAMPED, {}),
    "split experts": (4, EP2 | ETP2, CLAMPED, {}),
    "split experts alone": (4, ETP2, FULL, {}),
    "one-neuron experts": (4, EP2, PEER, {}),
    "one-neuron experts on tensor ranks": (4, EP4 | TP2, PEER, {}),
    "recomputed": (2, EP2, CLAMPED, {"activation_checkpoint": {"mode": "full"}}),
    "recomputed per op": (2, EP2, FULL, PER_OP),
    "compiled and recomputed per op": (2, EP2, FULL, COMPILED | PER_OP),
    "compiled one-neuron experts": (2, EP2, PEER, COMPILED),
    "offloaded": (2, EP2, CLAMPED, OFFLOADED),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, pool2: WorkerPool, pool4: WorkerPool) -> None:
    ranks, parallelism, ffn, more = CASES[name]
    case = twins.Case(ranks, parallelism, {"model": {"ffn": ffn}}, more)
    several = tables(**case.sections, parallelism=parallelism)
    twins.assert_equals_one_process(case, tables(**case.both), several, pool2, pool4)


@pytest.mark.parametrize(
    "model",
    [{"ffn": CLAMPED, "param_dtype": {"bias": "bfloat16"}}, {"ffn": PEER | {"query_norm": "batch"}}],
    ids=["parameters of two dtypes", "normalised over a micro-batch"],
)
def test_equals_fsdp(model: dict[str, Any], pool2: WorkerPool) -> None:
    """Where one process does another thing: it does not mix dtypes, and has other micro-batches."""
    sharded, spread = (pool2.run(twins.steps, tables(model=model, parallelism=p), timeout=200)[0] for p in ({}, EP2))
    torch.testing.assert_close(spread.losses, sharded.losses, rtol=twins.RTOL, atol=0)
    torch.testing.assert_close(spread.norms, sharded.norms, rtol=twins.RTOL, atol=0)


def test_several_micro_batches(pool2: WorkerPool) -> None:
    sections = {"model": {"dim": 32, "n_layers": 2, "ffn": FULL}, "optimizer": {"lr": 1e-3}}
    one = runs.train(sections, 2)
    training = {"local_batch_size": 2, "seq_len": 16, "mixed_precision_param": "float32", "loss_chunk_tokens": 0}
    for several in pool2.run(runs.train, sections | {"training": training, "parallelism": EP2}, 2, timeout=200):
        torch.testing.assert_close(several[:2], one[:2], rtol=twins.RTOL, atol=0)


# ---- uneven and even loads


def steps_of_one_expert(sections: dict[str, Any]) -> twins.Steps:
    """All tokens go to expert 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "in_turn", lambda self, positions: positions[:, None] * 0)
        return twins.steps(sections)


def test_ranks_without_tokens(pool4: WorkerPool) -> None:
    sections = {"model": {"ffn": MOE | {"top_k": 1}}, "debug": {"moe_force_load_balance": True}}
    one = steps_of_one_expert(tables(**sections))
    for several in pool4.run(steps_of_one_expert, tables(**sections, parallelism=EP4), timeout=200):
        assert not twins.differences(one, several)


def loads(sections: dict[str, Any]) -> tuple[twins.Steps, list[Tensor]]:
    """What the steps computed, and how often this rank's tokens chose each expert in the last one."""
    training = twins.built(sections)
    steps = twins.run(training, 1)
    return steps, [module.tally.last for module in training.model.modules() if isinstance(module, MoE)]


def test_balanced_routing(pool4: WorkerPool) -> None:
    """Each expert gets equally many tokens of each rank, and the same ones in every layout."""
    sections = {"model": {"ffn": FULL}, "debug": {"moe_force_load_balance": True}}
    one, chosen = loads(tables(**sections))
    assert [load.tolist() for load in chosen] == [[twins.ROWS * twins.T * 2 / 8] * 8] * 2
    for several, chosen in pool4.run(loads, tables(**sections, parallelism=EP4 | TP2), timeout=200):
        assert not twins.differences(one, several)
        assert [load.tolist() for load in chosen] == [[twins.ROWS * twins.T * 2 / 8 / 4] * 8] * 2


# ---- what is not training


CONTINUED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # name: experts, parallelism, tokens
    "moe": (FULL, EP4 | TP2, 5),
    "peer": (PEER, EP4 | TP2, 5),
    "split experts": (CLAMPED, EP2 | ETP2, 3),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_validation_and_sampling(name: str, pool4: WorkerPool) -> None:
    ffn, parallelism, n = CONTINUED[name]
    model = {"ffn": ffn}
    twins.assert_continues_alike(tables(model=model), tables(model=model, parallelism=parallelism), pool4, n)


# ---- checkpoints


def test_checkpoints_go_on_in_other_layouts(pool2: WorkerPool, pool4: WorkerPool, tmp_path: Path) -> None:
    model = {"ffn": CLAMPED}
    one = [go_on(tables(model=model), tmp_path / "one", step) for step in (0, 2, 4, 6)]
    layouts = ((pool2, EP2), (pool4, EP2 | ETP2), (pool2, {}), (pool4, EP4))
    several = [
        pool.run(go_on, tables(model=model, parallelism=layout), tmp_path / "several", step, timeout=200)[0]
        for step, (pool, layout) in zip((0, 2, 4, 6), layouts, strict=True)
    ]
    torch.testing.assert_close(several, one, rtol=5e-5, atol=0)


@pytest.mark.parametrize("ffn", [CLAMPED, MOE | {"n_experts": 2}], ids=["by expert", "by row"])
def test_initial_weights_are_those_of_one_process(ffn: dict[str, Any], pool4: WorkerPool) -> None:
    """To the bit, whatever is cut three times."""
    one = shards(tables(model={"ffn": ffn}))
    for layout in (EP2, EP2 | ETP2):
        for several in pool4.run(shards, tables(model={"ffn": ffn}, parallelism=layout), timeout=200):
            assert one.keys() == several.keys()
            assert all(torch.equal(several[name], weight) for name, weight in one.items())


# ---- the tests would notice


def broken(sections: dict[str, Any], mutant: str) -> twins.Steps:
    with pytest.MonkeyPatch.context() as patch:
        if mutant == "gradients of experts are not summed over replicas":
            patch.setattr(apply, "sharding_mesh", _without_replicas)
        if mutant == "every part of an expert adds the whole bias":
            patch.setattr(tensor.Local, "__call__", lambda self, p: local_of(_whole_if_shared(self), p))
        if mutant == "tokens come back in another order":
            patch.setattr(expert, "inverse", lambda order: order)
        if mutant == "ranks that share experts do not add up":
            patch.setattr(tensor.TensorRanks, "reduce", _own_part)
        return twins.steps(sections, 1)


sharding_of, local_of, reduce_of = apply.sharding_mesh, tensor.Local.__call__, tensor.TensorRanks.reduce


def _without_replicas(mesh: Any) -> Any:
    return mesh["dp_shard_mod_ep"] if "ep" in mesh.mesh_dim_names else sharding_of(mesh)


def _whole_if_shared(local: tensor.Local) -> tensor.Local:
    return tensor.Local("share", size=1, axes=2) if local.kind == "share" else local


def _own_part(self: tensor.TensorRanks, x: Tensor, training: bool) -> Tensor:
    whole = reduce_of(self, x, training)
    return x.chunk(self.size, dim=1)[self.rank] if len(x) == 1 else whole  # tokens of experts are one row


@pytest.mark.parametrize(
    ("mutant", "layout"),
    [
        ("gradients of experts are not summed over replicas", EP2 | REPLICAS),
        ("every part of an expert adds the whole bias", EP2 | ETP2),
        ("tokens come back in another order", EP2),
        ("ranks that share experts do not add up", ETP2),
    ],
)
def test_mutants_differ(mutant: str, layout: dict[str, int], pool4: WorkerPool) -> None:
    # Biases start at 0: only gradients tell.
    model = {"ffn": CLAMPED}
    one = twins.steps(tables(model=model), 1)
    assert twins.differences(one, pool4.run(broken, tables(model=model, parallelism=layout), mutant, timeout=200)[0])
