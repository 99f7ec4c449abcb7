"""Latent attention in training: every layout, recomputation, compilation, shared matrices, other dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runs import Run, train

RTOL = 1e-5
WEIGHT_ATOL = 2e-4
STEPS = 3
MODEL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "attention": {
        "type": "mla",
        "n_heads": 4,
        "q_rank": 12,
        "kv_rank": 16,
        "rope_dim": 8,
        "gate": "head",
        "registers": {"type": "learned", "n": 2},
    },
    "ffn": {"type": "moe", "n_experts": 4, "top_k": 2, "experts": {"hidden": 16}, "shared_hidden": 16},
    "layers": [{"at": 0, "ffn": {"type": "glu", "hidden": 24}}],
    "init": {"type": "normal", "std": 0.2},
}


def sections(local_batch_size: int = 8, model: dict[str, Any] = MODEL, **more: Any) -> dict[str, Any]:
    return {"model": model, "training": {"local_batch_size": local_batch_size, "global_batch_size": 8}} | more


@pytest.fixture(scope="module")
def serial() -> Run:
    return train(sections(), STEPS)


def assert_same(run: Run, reference: Run) -> None:
    torch.testing.assert_close(run.losses, reference.losses, rtol=RTOL, atol=0)
    torch.testing.assert_close(run.norms, reference.norms, rtol=10 * RTOL, atol=0)
    for name, weight in reference.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=WEIGHT_ATOL, msg=name)


def test_accumulation_equals_one_batch(serial: Run) -> None:
    assert_same(train(sections(3), STEPS), serial)


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp_equals_one_process(serial: Run, pool2: Any, compiled: bool) -> None:
    tables = sections(4, compile={"enable": compiled, "backend": "aot_eager"})
    for run in pool2.run(train, tables, STEPS):
        assert_same(run, serial)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_change_nothing(serial: Run, mode: str) -> None:
    run = train(sections(activation_checkpoint={"mode": mode, "selective_ac_option": "op"}), STEPS)
    assert (run.losses, run.norms) == (serial.losses, serial.norms)


def test_layers_that_share_matrices(pool2: Any) -> None:
    tables = sections(4, model=MODEL | {"stack": {"type": "shared", "scope": "attention"}})
    whole = train(tables, STEPS)
    for run in pool2.run(train, tables, STEPS):
        assert_same(run, whole)
    assert sum("kv.up" in name for name in whole.weights) == 1


def test_matrices_and_gains_in_dtypes_of_their_own(pool2) -> None:
    weights = pool2.run(train, sections(model=MODEL | {"param_dtype": {"hidden": "bfloat16"}}), 1)[0].weights
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    for name in ("q.down", "q.up", "kv.down", "kv.up", "o"):
        assert dtypes[f"stack.blocks.1.attention.{name}.weight"] == torch.bfloat16
    assert dtypes["stack.blocks.1.attention.kv.norm.weight"] == torch.float32
