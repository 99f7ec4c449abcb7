"""Tensor parallelism, alone and with FSDP and HSDP, trains as one process does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.helpers import make_manager
from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.runs import full
from titan_lite.checkpoint.state import materialize_optimizer_state, model_tensors, optimizer_tensors
from titan_lite.generation import Sampling, generate
from titan_lite.models.dropout import Draw
from titan_lite.parallel import tensor
from titan_lite.parallel.fsdp import evaluating

TP2 = {"tensor_parallel_degree": 2}
TP4 = {"tensor_parallel_degree": 4}
HSDP = {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2}
NGPT = {
    "embedding": "unit",
    "residual": "ngpt",
    "linear": "unit",
    "norm": "none",
    "ffn": "glu_scaled",
    "attention": {"qk_norm": "l2_scaled", "scale": "sqrt", "n_kv_heads": 1},
    "head": {"logit_scale": "learned"},
}
HEAD = {"bias": True, "logit_scale": "learned", "logit_cap": {"type": "tanh", "cap": 5.0}}
GAINS = {"norm": "layernorm", "attention": {"qk_norm": "rms_full", "bias": ["q", "k", "v", "o"]}}
LATENT = {"type": "mla", "n_heads": 4, "head_dim": 8, "rope_dim": 4, "value_dim": 8, "kv_rank": 16}
MOE = {"ffn": {"type": "moe", "balance": ["sequence", "micro_batch"], "shared_hidden": 24, "experts": {"hidden": 24}}}


def tables(**sections: Any) -> dict[str, Any]:
    """A tiny job; `sections` are merged over it, tables of the model too."""
    out: dict[str, Any] = {
        "model": {"dim": 32, "n_layers": 2, "attention": {"n_heads": 4, "n_kv_heads": 2}, "ffn": {"hidden": 24}},
        "training": {
            "local_batch_size": twins.ROWS,
            "seq_len": twins.T,
            "steps": 10,
            "mixed_precision_param": "float32",
            "loss_chunk_tokens": 24,  # does not divide a micro-batch
        },
        "optimizer": {"weight_decay": 0.0},
        "lr_scheduler": {"warmup_steps": 0},
        "tokenizer": {"type": "bytes"},
        "activation_checkpoint": {"mode": "none"},
    }
    for name, section in copy.deepcopy(sections).items():
        table = out.setdefault(name, {})
        for key, value in section.items():
            merge = isinstance(value, dict) and isinstance(table.get(key), dict) and "type" not in value
            table[key] = {**table[key], **value} if merge else value
    if isinstance(out["model"]["ffn"], str):
        out["model"]["ffn"] = {"type": out["model"]["ffn"], "hidden": 24}
    return out


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallelism, what both runs have, what only the parallel one has
    "fsdp x tp": (4, TP2, {"model": GAINS}, {}),
    "hsdp x tp": (4, HSDP, {"model": {"head": {"tied": True}}}, {}),
    "fewer key/value heads": (4, TP4, {"model": GAINS}, {}),
    "one key/value head": (
        4,
        TP4,
        {"model": {"attention": {"n_kv_heads": 1, "registers": {"type": "learned", "n": 2}}}},
        {},
    ),
    "nGPT": (4, TP2, {"model": NGPT, "optimizer": {"weight_decay": 0.0}}, {}),
    "experts": (2, TP2, {"model": MOE}, {}),
    "experts of one sum, on fsdp x tp": (4, TP2, {"model": {"ffn": MOE["ffn"] | {"balance": ["sequence"]}}}, {}),
    "latent attention": (4, TP2, {"model": {"attention": LATENT, "final_norm": "layernorm"}}, {}),
    "latent queries": (2, TP2, {"model": {"attention": LATENT | {"q_rank": 12}}}, {}),
    "modules of further tokens": (4, TP2, {"model": {"mtp": {"type": "modules", "depth": 2, "reads": "normed"}}}, {}),
    "heads of further tokens": (
        2,
        TP2,
        {"model": {"mtp": {"type": "heads", "depth": 2}, "head": {"tied": True}}, "training": {"loss_chunk_tokens": 0}},
        {},
    ),
    "loss in chunks": (2, TP2, {"model": {"head": HEAD}, "training": {"z_loss": 1e-2}}, {}),
    "loss at once": (2, TP2, {"model": {"head": HEAD}, "training": {"z_loss": 1e-2, "loss_chunk_tokens": 0}}, {}),
    "gathered logits in chunks": (
        2,
        TP2 | {"disable_loss_parallel": True},
        {"model": {"head": HEAD}, "training": {"z_loss": 1e-2}},
        {},
    ),
    "gathered logits": (
        2,
        TP2 | {"disable_loss_parallel": True},
        {"model": {"head": HEAD}, "training": {"loss_chunk_tokens": 0}},
        {},
    ),
    "recomputed": (2, TP2, {}, {"activation_checkpoint": {"mode": "full"}}),
    "recomputed per op": (2, TP2, {}, {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}),
    "compiled": (4, TP2, {"model": GAINS}, {"compile": {"enable": True, "backend": "aot_eager"}}),
    "compiled and recomputed": (
        2,
        TP2,
        {},
        {
            "compile": {"enable": True, "backend": "aot_eager"},
            "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
        },
    ),
    "compiled, whole blocks recomputed": (
        2,
        TP2,
        {"model": {"n_layers": 1}},
        {"compile": {"enable": True, "backend": "aot_eager"}, "activation_checkpoint": {"mode": "full"}},
    ),
    "compiled to a budget": (
        2,
        TP2,
        {"model": MOE},
        {"compile": {"enable": True, "backend": "aot_eager"}, "activation_checkpoint": {"mode": "memory_budget"}},
    ),
    "offloaded": (4, TP2, {}, {"training": {"enable_cpu_offload": True}}),
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


def test_parameters_of_two_dtypes(pool2: WorkerPool, pool4: WorkerPool) -> None:
    """They have meshes of their own; against FSDP alone, since one process does not mix dtypes."""
    model = {"param_dtype": {"norm": "bfloat16"}}
    sharded = pool2.run(twins.steps, tables(model=model), timeout=200)[0]
    split = pool4.run(twins.steps, tables(model=model, parallelism=TP2), timeout=200)[0]
    torch.testing.assert_close(split.losses, sharded.losses, rtol=twins.RTOL, atol=0)
    torch.testing.assert_close(split.norms, sharded.norms, rtol=twins.RTOL, atol=0)


# ---- what is not training


def continuation(sections: dict[str, Any], n: int) -> tuple[float, list[int], torch.Tensor]:
    """The validation loss of some rows, sampled tokens, and the logits of a text of odd length."""
    training = twins.built(sections)
    rows = twins.share(training, 0)
    with evaluating(training.model):
        loss = training.validation_objective(training.model, rows.tokens, rows.targets, rows.documents)
        agree = training.world.broadcast
        drawn = generate(training.model, [1, 2, 3], n, Sampling(), 0, twins.CPU, twins.VOCAB, agree=agree)
        tokens = list(drawn)
        logits = training.model(torch.tensor([[1, 2, 3, 4, 5]]))
    return training.world.total(loss.item())[0], tokens, logits


def test_validation_and_sampling(pool4: WorkerPool) -> None:
    loss, tokens, logits = continuation(tables(model=GAINS), 5)
    for other in pool4.run(continuation, tables(model=GAINS, parallelism=TP2), 5, timeout=200):
        assert other[0] == pytest.approx(loss, rel=1e-6)
        assert other[1] == tokens
        torch.testing.assert_close(other[2], logits, rtol=1e-5, atol=1e-5)


# ---- checkpoints


def go_on(sections: dict[str, Any], folder: Path, step: int) -> tuple[float, float]:
    """Trains steps `step` and the next one with AdamW, on from the checkpoint before if there is one, and saves."""
    training = twins.built(sections)
    adam = torch.optim.AdamW([p for p in training.model.parameters() if p.requires_grad], lr=1e-3)
    training = twins.replace(training, optimizer=adam, peak_lr=1e-3)
    manager = make_manager(folder, training.world)
    if step:
        materialize_optimizer_state(adam)
        start = manager.start()
        assert start is not None
        assert start.folder.name == f"step-{step}"
        manager.load(start, model_tensors(training.model) | optimizer_tensors(training.model, adam))
    results = [twins.one_step(training, index, twins.ROWS) for index in range(step, step + 2)]
    assert manager.save(step + 2, model_tensors(training.model) | optimizer_tensors(training.model, adam), {})
    return results[-1].loss.item(), results[-1].grad_norm.item()


def test_checkpoints_go_on_in_other_layouts(pool2: WorkerPool, pool4: WorkerPool, tmp_path: Path) -> None:
    sections = {"model": {"attention": {"n_kv_heads": 1}, "head": {"tied": True}}}
    one = [go_on(tables(**sections), tmp_path / "one", step) for step in (0, 2, 4, 6)]
    split, sharded = tables(**sections, parallelism=TP2), tables(**sections)
    several = [
        pool.run(go_on, job, tmp_path / "several", step, timeout=200)[0]
        for step, (pool, job) in zip(
            (0, 2, 4, 6), ((pool2, split), (pool2, sharded), (pool4, split), (pool2, split)), strict=True
        )
    ]
    torch.testing.assert_close(several, one, rtol=5e-5, atol=0)


def shards(sections: dict[str, Any]) -> dict[str, Any]:
    training = twins.built(sections)
    return {name: full(parameter) for name, parameter in training.model.named_parameters()}


def test_initial_weights_are_those_of_one_process(pool4: WorkerPool) -> None:
    """To the bit, whatever is cut twice."""
    one = shards(tables(model=GAINS))
    for sections in ({"parallelism": TP2}, {"parallelism": TP4}):
        for several in pool4.run(shards, tables(model=GAINS, **sections), timeout=200):
            assert one.keys() == several.keys()
            assert all(torch.equal(several[name], weight) for name, weight in one.items())


# ---- the tests would notice


def broken(sections: dict[str, Any], mutant: str) -> twins.Steps:
    with pytest.MonkeyPatch.context() as patch:
        if mutant == "gradients of norms are not summed":
            patch.setattr(tensor.Local, "__call__", lambda self, p: p.to_local() if p.device_mesh.ndim == 1 else p)
        if mutant == "every rank adds the whole bias":
            patch.setattr(tensor, "place", lambda style, shape, rank, size: _whole_bias(style, shape, rank, size))
        if mutant == "ranks drop the same elements":
            patch.setattr(Draw, "split", lambda self, ranks: None)
        if mutant == "the loss counts the tokens of one rank":
            patch.setattr(twins, "step", lambda training, rows, n, i: step_of(training, rows, n / 2, i))
        if mutant == "a sum over ranks has no gradient":
            patch.setattr(tensor.TensorRanks, "sum", lambda self, x: x + (sum_of(self, x) - x).detach())
        return twins.steps(sections, 1)


place_of, step_of, sum_of = tensor.place, twins.step, tensor.TensorRanks.sum


def _whole_bias(style: Any, shape: torch.Size, rank: int, size: int) -> Any:
    where, local = place_of(style, shape, rank, size)
    return where, tensor.Local("whole") if local.kind == "share" else local


@pytest.mark.parametrize(
    "mutant",
    [
        "gradients of norms are not summed",
        "every rank adds the whole bias",
        "ranks drop the same elements",
        "the loss counts the tokens of one rank",
        "a sum over ranks has no gradient",
    ],
)
def test_mutants_differ(mutant: str, pool2: WorkerPool) -> None:
    model = {**GAINS, "residual": {"dropout": 0.2}}
    one = twins.steps(tables(model=model), 1)
    assert twins.differences(one, pool2.run(broken, tables(model=model, parallelism=TP2), mutant, timeout=200)[0])


def left_out(sections: dict[str, Any]) -> str:
    """What is said of a parameter that stays on every rank by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor, "distributed", lambda parameter, mesh, placement: parameter)
        try:
            twins.built(sections)
        except AssertionError as error:
            return str(error)
    return ""


def test_a_parameter_that_is_left_out_is_an_error(pool2: WorkerPool) -> None:
    for said in pool2.run(left_out, tables(parallelism=TP2), timeout=200):
        assert "these have been left out: ['embedding.weight'" in said
