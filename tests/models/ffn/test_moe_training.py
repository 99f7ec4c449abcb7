"""Expert layers in training: every layout, recomputation, compilation, and what is logged and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs import build_tiny, full, global_batch
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.ffn import GLU, PEER, MoE
from titan_lite.models.flops import active_parameters, training_flops_per_token
from titan_lite.models.module import collect_metrics
from titan_lite.step import MicroBatch, step

RTOL = 1e-5
"""fp32: losses and gradient norms of three steps."""
WEIGHT_ATOL = 2e-4
"""fp32: weights after three steps of Adam at lr 1e-2, which turns rounding of tiny gradients into such steps."""
STEPS = 3
MOE: dict[str, Any] = {
    "type": "moe",
    "n_experts": 8,
    "top_k": 2,
    "experts": {"hidden": 16, "bias": True},
    "router": {"type": "sigmoid", "n_groups": 4, "top_groups": 2, "scale": 1.5},
    "offset": {"type": "load", "rate": 0.05},
    "balance": [{"type": "sequence", "coefficient": 0.1}, "z_loss"],
    "shared_hidden": 16,
}
PEERS: dict[str, Any] = {"type": "peer", "n_keys": 8, "n_heads": 2, "top_k": 4, "query_dim": 16}
BATCH_NORM = PEERS | {"query_norm": {"type": "batch", "decay": 0.5}}
COMPILED = {"enable": True, "backend": "aot_eager"}


def sections(ffn: dict[str, Any], local_batch_size: int = 8, **more: Any) -> dict[str, Any]:
    """`init` large enough for experts to differ."""
    model = {"dim": 32, "n_layers": 2, "ffn": ffn, "init": {"type": "normal", "std": 0.2}}
    return {"model": model, "training": {"local_batch_size": local_batch_size, "global_batch_size": 8}} | more


def run_and_state(tables: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, float]]:
    """Losses, norms, all parameters and buffers, and the metrics of the last step."""
    job, training = build_tiny(tables)
    world, losses, norms = training.world, [], []
    for index in range(STEPS):
        whole = global_batch(index)
        share = len(whole.tokens) // world.size
        mine = [part[world.rank * share : (world.rank + 1) * share] for part in whole]
        size = job.training.local_batch_size
        batches = [MicroBatch(*parts) for parts in zip(*(part.split(size) for part in mine), strict=True)]
        tensors = step(training, batches, (whole.targets != -100).sum().item(), index)
        losses.append(tensors.loss.item())
        norms.append(tensors.grad_norm.item())
    state = dict(training.model.named_parameters()) | dict(training.model.named_buffers())
    metrics = collect_metrics(training.model, world.total_tensor)
    return losses, norms, {n: full(t) for n, t in state.items()}, {n: m.item() for n, m in metrics.items()}


def assert_same(run: Any, reference: Any, exact: bool = False) -> None:
    (losses, norms, state, metrics), (losses_, norms_, state_, metrics_) = run, reference
    if exact:
        assert losses == losses_
        assert norms == norms_
    torch.testing.assert_close(losses, losses_, rtol=RTOL, atol=0)
    torch.testing.assert_close(norms, norms_, rtol=10 * RTOL, atol=0)
    assert state.keys() == state_.keys()
    for name, tensor in state_.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0 if exact else WEIGHT_ATOL, msg=name)
    assert metrics == pytest.approx(metrics_, rel=1e-5)


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return {"moe": run_and_state(sections(MOE)), "peer": run_and_state(sections(PEERS))}


LAYERS = {"moe": MOE, "peer": PEERS}


def test_offsets_have_moved(serial: dict[str, Any]):
    losses, _, state, metrics = serial["moe"]
    for layer in range(2):
        values = state[f"stack.blocks.{layer}.ffn.offset.value"]
        assert values.abs().max() == pytest.approx(0.15)
        assert len(values.unique()) > 2
        assert not state[f"stack.blocks.{layer}.ffn.tally.count"].any()
    assert set(metrics) == {f"stack.blocks.{layer}.ffn.max_load" for layer in range(2)}
    assert all(1 < value <= 4 for value in metrics.values())
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize("local_batch_size", [2, 3])
@pytest.mark.parametrize("ffn", LAYERS)
def test_accumulation_equals_one_batch(serial: dict[str, Any], ffn: str, local_batch_size: int):
    """Balancing losses and loads add up; 3 leaves a smaller last micro-batch."""
    assert_same(run_and_state(sections(LAYERS[ffn], local_batch_size)), serial[ffn])


@pytest.mark.parametrize("local_batch_size", [4, 2])
@pytest.mark.parametrize("ffn", LAYERS)
def test_fsdp_equals_one_process(serial: dict[str, Any], pool2: Any, ffn: str, local_batch_size: int):
    """Offsets are the same on both ranks, whose tokens chose differently; also where experts do not divide evenly."""
    for run in pool2.run(run_and_state, sections(LAYERS[ffn], local_batch_size)):
        assert_same(run, serial[ffn])


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("ffn", LAYERS)
def test_recomputed_activations_count_once(serial: dict[str, Any], ffn: str, mode: str):
    tables = sections(LAYERS[ffn], activation_checkpoint={"mode": mode, "selective_ac_option": "op"})
    assert_same(run_and_state(tables), serial[ffn], exact=True)


@pytest.mark.parametrize("ffn", LAYERS)
def test_compiled_equals_eager(serial: dict[str, Any], ffn: str):
    assert_same(run_and_state(sections(LAYERS[ffn], compile=COMPILED)), serial[ffn])


@pytest.mark.parametrize("ffn", LAYERS)
def test_sharded_recomputed_and_compiled(serial: dict[str, Any], pool2: Any, ffn: str):
    tables = sections(LAYERS[ffn], 4, compile=COMPILED, activation_checkpoint={"mode": "full"})
    assert_same(pool2.run(run_and_state, tables)[1], serial[ffn])


def test_running_statistics_of_queries(pool2: Any):
    """Recomputed or compiled they are the same; ranks, which normalise by their own batches, agree about them."""
    reference = run_and_state(sections(BATCH_NORM))
    mean = reference[2]["stack.blocks.0.ffn.query_norm.mean"]
    assert mean.abs().max() > 1e-3
    for more in ({"activation_checkpoint": {"mode": "full"}}, {"compile": COMPILED}):
        assert_same(run_and_state(sections(BATCH_NORM, **more)), reference)
    first, second = pool2.run(run_and_state, sections(BATCH_NORM, 2))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert not torch.equal(first[2]["stack.blocks.0.ffn.query_norm.mean"], mean)


def test_dense_layers_then_experts():
    """A dense first layer, as DeepSeek-V3 has: only the others choose, count and balance."""
    tables = sections(MOE)
    tables["model"]["n_layers"] = 3
    tables["model"]["layers"] = [{"at": 0, "ffn": {"type": "glu", "hidden": 40}}]
    _, training = build_tiny(tables)
    assert [type(block.ffn) for block in training.model.stack.blocks.values()] == [GLU, MoE, MoE]  # type: ignore[attr-defined]
    _, _, state, metrics = run_and_state(tables)
    assert sorted(metrics) == ["stack.blocks.1.ffn.max_load", "stack.blocks.2.ffn.max_load"]
    assert state["stack.blocks.0.ffn.gate.weight"].shape == (40, 32)
    tables["model"]["layers"] = [{"at": "1:", "ffn": PEERS}]
    _, training = build_tiny(tables)
    assert [type(block.ffn) for block in training.model.stack.blocks.values()] == [MoE, PEER, PEER]  # type: ignore[attr-defined]


def test_nothing_is_made_for_a_model_without_experts():
    _, training = build_tiny({})
    assert training.token_weight(100.0) is None
    assert collect_metrics(training.model, lambda tensor: tensor) == {}
    _, training = build_tiny(sections(MOE))
    assert training.token_weight(100.0) == pytest.approx(0.01)


def test_flops_and_parameters_count_what_is_used():
    def sizes(ffn: dict[str, Any]) -> tuple[int, int]:
        _, training = build_tiny(sections(ffn))
        flops = training_flops_per_token(training.model, training.specs, 16)
        return flops, active_parameters(training.model, training.specs)

    def without(count: tuple[int, int]) -> tuple[int, int]:
        return count[0] - dense[0], count[1] - dense[1]

    D, hidden = 32, 16
    dense = sizes({"type": "glu", "hidden": hidden})
    one_dense = 3 * D * hidden
    flops, active = without(sizes({"type": "moe", "n_experts": 8, "top_k": 2, "experts": {"hidden": hidden}}))
    per_layer = 2 * one_dense + 8 * D - one_dense  # two experts and the router, in place of one network
    assert (flops, active) == (2 * 6 * per_layer, 2 * per_layer)
    flops, active = without(sizes(PEERS | {"query_norm": "none"}))
    experts, query, keys = 2 * 2 * 4 * D, D * 2 * 16, 2 * 8 * 8
    assert flops == 2 * 6 * (experts + query + 2 * keys - one_dense)  # both heads read the one table of keys
    assert active == 2 * (experts + query + keys - one_dense)


def test_what_is_logged(tmp_path: Path):
    from titan_lite.run.signals import StopFlag
    from titan_lite.trainer import Trainer

    tables: dict[str, Any] = {
        "job": {"dump_folder": str(tmp_path)},
        "model": {"dim": 32, "n_layers": 2, "ffn": MOE, "attention": {"n_heads": 4}},
        "training": {"local_batch_size": 2, "seq_len": 16, "steps": 3},
        "tokenizer": {"type": "bytes"},
        "metrics": {"log_freq": 2},
        "validation": {"enable": False},
        "checkpoint": {"enable": False},
    }
    tables["model"]["layers"] = [{"at": 1, "ffn": PEERS}]
    assert Trainer(job_from_dict(tables), StopFlag()).run() == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 1 <= line["stack.blocks.0.ffn.max_load"] <= 4
        assert 0 < line["stack.blocks.1.ffn.used_experts"] <= 1
        assert 0 <= line["stack.blocks.1.ffn.usage_kl"] < 5


@pytest.mark.parametrize("ffn", ["moe", "peer"])
def test_no_experts_in_ngpt(ffn: str):
    model = {"residual": "ngpt", "norm": "none", "final_norm": "none", "ffn": ffn}
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": model, "optimizer": {"weight_decay": 0.0}, "lr_scheduler": {"warmup_steps": 0}})
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == (CROSS_FIELD, "model.residual.type")
    assert f'model.ffn.type = "{ffn}"' in problem.why
