"""Verification with the weights of one block at a time sees what it sees with all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts import convert_to_hf
from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.hf import memory, verify
from titan_lite.hf.by_block import BlockLoader, Streamed, units_of
from titan_lite.hf.errors import ConversionError
from titan_lite.hf.export import export
from titan_lite.hf.llama import LlamaLike
from titan_lite.hf.loaded import ByBlock
from titan_lite.hf.rule import Rule, times

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"preset": "llama3", "n_layers": 3, "head": {"tied": True}},
    "experts, stacked by transformers": {"preset": "mixtral"},
    "modules that transformers' class lacks": {
        "preset": "deepseek_v3",
        "mtp": {"type": "modules", "reads": "normed"},
    },
    "norms behind, narrow rows, a position table": {"preset": "opt", "flavor": "debug350m"},
    "code of its own, tied": {
        "preset": "llama3",
        "head": {"tied": True},
        "attention": {"registers": {"type": "learned", "n": 2}},
    },
    "code of its own, shared branches": {
        "preset": "llama3",
        "n_layers": 3,
        "stack": {"type": "scheduled", "schedule": [0, 1, 0], "scope": "branches"},
        "attention": {"registers": {"type": "learned", "n": 2}},
    },
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a continuation loads every block anew."""
    monkeypatch.setattr(verify, "NEW_TOKENS", 6)


@pytest.mark.parametrize("name", MODELS)
def test_both_see_the_same(name: str, tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables(**MODELS[name]))
    whole, by_block = (
        export(tmp_path / "run", tmp_path / method, dtype="bfloat16", method=method)["verified"]
        for method in ("whole", "by_block")
    )
    assert (whole.pop("method"), by_block.pop("method")) == ("whole", "by_block")
    assert len(by_block["block_differences"]) >= 2
    assert by_block["greedy_tokens"] == 12
    assert by_block["rounding"] > 1e-4  # the folder's own weights were computed with, and then the checkpoint's
    del whole["memory_available"], by_block["memory_available"]
    assert whole == by_block


def test_the_choice_follows_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = save_random(tmp_path / "run", model_tables("llama3"))
    for free, method in ((2**30, "by_block"), (2**31, "whole"), (None, "whole")):
        monkeypatch.setattr(verify, "available_memory", lambda free=free: free)
        report = export(dump, tmp_path / f"{method} {free}")
        assert (report["verified"]["method"], report["verified"]["memory_available"]) == (method, free)
        assert report["verified"]["memory_needed"] == 2**30 + 4 * report["weights"]["parameters"]
    assert convert_to_hf.main([str(dump), str(tmp_path / "out"), "--verify", "by_block"]) == 0
    seen = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["verified"]
    assert (seen["method"], seen["greedy_equal"]) == ("by_block", True)


def test_continuations_that_would_read_too_much_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_lite.hf import loaded

    dump = save_random(tmp_path / "run", model_tables("llama3"))
    monkeypatch.setattr(loaded, "READS", 1)
    seen = export(dump, tmp_path / "out", method="by_block")["verified"]
    assert (seen["greedy_tokens"], seen["greedy_equal"]) == (0, None)


def test_a_wrong_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = save_random(tmp_path / "run", model_tables("llama3", n_layers=3))
    right = LlamaLike.rules

    def wrong(self: Any, model: Any) -> list[Rule]:
        name = "stack.blocks.1.ffn.down.weight"
        return [Rule(r.ours, r.theirs, times(1.01)) if r.ours == (name,) else r for r in right(self, model)]

    monkeypatch.setattr(LlamaLike, "rules", wrong)
    with pytest.raises(ConversionError, match=r"logits differ by up to .*; block 1 is the first that differs"):
        export(dump, tmp_path / "out", method="by_block")
    assert not (tmp_path / "out").exists()


def held(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.device.type != "meta")


def test_one_unit_at_a_time_has_weights(tmp_path: Path) -> None:
    dump = save_random(tmp_path / "run", model_tables("llama3", n_layers=3))
    export(dump, tmp_path / "out", verified=False)
    loader = BlockLoader(tmp_path / "out")
    model = loader.skeleton()
    units = units_of(model)
    assert units == [*(f"model.layers.{i}" for i in range(3)), "model.embed_tokens", "model.norm", "lm_head"]
    Streamed(model, units, loader.values)
    most: list[int] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: most.append(held(model)))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    largest = max(sum(p.numel() for p in model.get_submodule(path).parameters()) for path in units)
    assert max(most) == largest
    assert held(model) == 0


def test_ours_is_streamed_too(tmp_path: Path) -> None:
    from titan_lite.hf.choose import Unloaded
    from titan_lite.hf.export import open_checkpoint
    from titan_lite.hf.loaded import Subject
    from titan_lite.hf.source import InMemory

    opened = open_checkpoint(save_random(tmp_path / "run", model_tables("llama3", n_layers=3)))
    tensors, nothing = opened.tensors, Unloaded(frozenset(), InMemory({}))
    model = ByBlock().ours(Subject(tmp_path, opened.shape, tensors, tensors, nothing, torch.float32, True))
    most: list[int] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: most.append(held(model)))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in model.shard_units())
    assert held(model) == model.norm.weight.numel()  # which is in no unit
    assert max(most) == largest + held(model)


def test_memory_is_the_least_of_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.available_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    3000 kB\n")
    assert memory.available_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert memory.available_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("1100000\n")
    assert memory.available_memory() == 1_000_000
