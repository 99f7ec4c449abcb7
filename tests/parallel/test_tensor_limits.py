"""What tensor parallelism refuses when the config is read: both keys, the rule, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models.tiny import tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.module import Module
from titan_lite.parallel import limits
from titan_lite.parallel.tensor import UnplannedError, styles

SMALL: dict[str, Any] = {"attention": {"n_heads": 4}, "ffn": {"hidden": 24}}


def refusals(degree: int, **sections: Any) -> dict[str, str]:
    """{key: why and what is allowed} of a job with this tensor-parallel degree."""
    tables = {"model": SMALL, "parallelism": {"tensor_parallel_degree": degree}}
    for name, section in sections.items():
        tables[name] = tables.get(name, {}) | section
    try:
        job_from_dict(tables)
    except ConfigError as error:
        return {problem.key: f"{problem.why}; {problem.allowed}" for problem in error.problems}
    return {}


def test_what_fits_is_taken() -> None:
    assert refusals(4) == {}


@pytest.mark.parametrize(
    ("degree", "sections", "key", "allowed"),
    [
        (
            2,
            {"training": {"seq_len": 15}},
            "training.seq_len",
            "16, or parallelism.tensor_parallel_degree = 1, 3, 5, 15",
        ),
        (2, {"model": {"vocab_size": 301}}, "model.vocab_size", "300, or"),
        (8, {}, "model.attention.n_heads", "8, or parallelism.tensor_parallel_degree = 1, 2, 4"),
        (
            2,
            {"model": {"ffn": {"hidden": 25}}},
            "model.ffn.hidden",
            "24, or parallelism.tensor_parallel_degree = 1, 5, 25",
        ),
        (2, {"model": {"ffn": {"type": "mlp", "hidden": 25}}}, "model.ffn.hidden", "24, or"),
        (2, {"model": {"ffn": {"type": "glu_scaled", "hidden": 25}}}, "model.ffn.hidden", "24, or"),
        (2, {"model": {"ffn": {"type": "moe", "shared_hidden": 25}}}, "model.ffn.shared_hidden", "24, or"),
        (
            4,
            {"model": {"attention": {"n_heads": 12, "n_kv_heads": 6, "head_dim": 8}}},
            "model.attention.n_kv_heads",
            "1, 2, 4, 12",
        ),
        (
            2,
            {"model": {"attention": {"type": "gqa_fused", "n_heads": 4, "n_kv_heads": 1}}},
            "model.attention.n_kv_heads",
            'parallelism.tensor_parallel_degree = 1, or attention.type = "gqa"',
        ),
        (
            2,
            {"model": {"attention": {"n_heads": 4, "n_kv_heads": 1}, "memory": {"type": "xl", "length": 4}}},
            "model.memory.type",
            "model.memory.recompute_kv = true, or parallelism.tensor_parallel_degree = 1",
        ),
        (
            2,
            {"model": {"ffn": {"type": "peer", "query_norm": "batch"}}},
            "model.ffn.query_norm.type",
            '"rms" or "none", or parallelism.tensor_parallel_degree = 1',
        ),
        (
            2,
            {"model": SMALL | {"layers": [{"at": 1, "ffn": {"hidden": 25}}]}},
            "model.layers[0].ffn.hidden",
            "24, or parallelism.tensor_parallel_degree = 1, 5, 25",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(degree: int, sections: dict[str, Any], key: str, allowed: str) -> None:
    found = refusals(degree, **sections)
    assert set(found) == {key}
    assert f"parallelism.tensor_parallel_degree = {degree}" in found[key]
    assert allowed in found[key]


def test_a_vocabulary_of_the_tokenizer_is_a_multiple_of_64() -> None:
    heads = {"attention": {"n_heads": 6, "head_dim": 4}, "ffn": {"hidden": 24}}
    found = refusals(3, model=heads, training={"seq_len": 12})
    assert set(found) == {"model.vocab_size"}
    assert "a multiple of 3, such as 258" in found["model.vocab_size"]


def test_asynchronous_collectives_need_the_compiler_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "parallelism.enable_async_tensor_parallel"
    on = {"tensor_parallel_degree": 2, "enable_async_tensor_parallel": True}
    assert "compile.enable" in refusals(2, parallelism=on)[key]
    assert "compile.backend" in refusals(2, parallelism=on, compile={"enable": True, "backend": "aot_eager"})[key]
    monkeypatch.setattr(limits, "has_cuda", lambda: False)
    assert "CUDA" in refusals(2, parallelism=on, compile={"enable": True})[key]
    monkeypatch.setattr(limits, "has_cuda", lambda: True)
    assert refusals(2, parallelism=on, compile={"enable": True}) == {}
    assert refusals(1, parallelism=on | {"tensor_parallel_degree": 1}) == {}  # idle


class Unplanned(Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))


def test_a_module_without_a_plan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.stack.blocks["1"].attention.more = Unplanned()
    with pytest.raises(UnplannedError, match=r"stack\.blocks\.1\.attention\.more\.weight of Unplanned"):
        styles(model)
    monkeypatch.setattr("titan_lite.models.spec.meta_model", lambda config: model)
    assert "Unplanned" in refusals(2)["parallelism.tensor_parallel_degree"]
