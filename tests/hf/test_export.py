"""Checkpoints become folders that transformers loads, and folders become checkpoints again, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.checkpoints import save_random
from tests.hf.test_agreement import FAMILIES
from tests.hf.twins import preset_config
from titan_lite.data.tokenizer import Bytes
from titan_lite.hf import ARCHITECTURES
from titan_lite.hf.export import export
from titan_lite.hf.importer import import_folder
from titan_lite.hf.stored import FolderTensors
from titan_lite.hf.tokenizer_files import pipeline

SMALL = {"n_layers": 2, "vocab_size": 0}
FIRST = {model_type: (preset, flavor, changes) for model_type, preset, flavor, changes in reversed(FAMILIES.values())}
"""By model_type, the first of its families."""


def model_tables(preset: str, flavor: str = "", **changes: Any) -> dict[str, Any]:
    """A small [model] of a preset, resolved."""
    return preset_config(preset, flavor, **(SMALL | changes)).model_dump() | {"name": preset, "flavor": ""}


def same_bits(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors under the same names."""
    a, b = FolderTensors(one), FolderTensors(other)
    return a.meta.keys() == b.meta.keys() and all(
        a.meta[name].dtype == b.meta[name].dtype and torch.equal(a.read(name), b.read(name)) for name in a.meta
    )


def test_families_cover_all_architectures() -> None:
    assert FIRST.keys() == ARCHITECTURES.keys()


def tokenizer_for(model_type: str, folder: Path) -> dict[str, Any]:
    """Bytes; for Qwen2 with its normalizer, which transformers takes for every model_type "qwen2"."""
    if model_type != "qwen2":
        return {"type": "bytes"}
    from tokenizers import normalizers

    like_qwen = pipeline(Bytes.Config().build())
    like_qwen.normalizer = normalizers.NFC()
    folder.mkdir()
    like_qwen.save(str(folder / "tokenizer.json"))
    return {"type": "huggingface", "path": str(folder), "bos": ""}


def test_a_tokenizer_that_transformers_would_replace(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("qwen2"))
    assert export(tmp_path / "run", tmp_path / "hf", verified=False)["model_type"] == "llama"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    preset, flavor, changes = FIRST[model_type]
    dtype = torch.bfloat16 if model_type in ("gemma2", "mixtral", "gpt2") else torch.float32
    tables = model_tables(preset, flavor, **changes)
    save_random(tmp_path / "run", tables, dtype, tokenizer=tokenizer_for(model_type, tmp_path / "tokenizer"))
    report = export(tmp_path / "run", tmp_path / "hf", shard_size=100_000)
    assert (report["model_type"], report["folds"]) == (model_type, [])
    seen = report["verified"]
    assert seen["problems"] == ()
    assert seen["max_logit_difference"] < 1e-4
    assert seen["greedy_tokens"] == 128
    assert len(report["weights"]["files"]) > 1
    import_folder(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "hf", tmp_path / "again")


SHAPES: dict[str, dict[str, Any]] = {
    "wide heads, one for keys, tied, llama3 scaling": {
        "attention": {
            "n_heads": 4,
            "n_kv_heads": 1,
            "head_dim": 48,
            "position": {"scaling": {"type": "llama3", "factor": 8.0, "original_max_len": 32}},
        },
        "head": {"tied": True},
    },
    "a head of keys for each, yarn": {
        "attention": {
            "n_heads": 4,
            "n_kv_heads": 4,
            "position": {"scaling": {"type": "yarn", "factor": 4.0, "original_max_len": 32}},
        },
    },
    "linear scaling, biases": {
        "attention": {"bias": ["q", "k", "v", "o"], "position": {"scaling": {"type": "linear", "factor": 4.0}}},
        "ffn": {"bias": True},
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_llama(name: str, tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("llama3", **SHAPES[name]))
    report = export(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    assert (report["model_type"], report["dtype"]) == ("llama", "bfloat16")
    assert report["verified"]["max_logit_difference"] < 1e-4
    assert report["verified"]["rounding"] > 1e-4  # the folder's own weights are not the checkpoint's
    import_folder(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "hf", tmp_path / "again")


def test_published_names_of_experts(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("mixtral"))
    export(tmp_path / "run", tmp_path / "hf", verified=False)
    names = FolderTensors(tmp_path / "hf").meta
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in names
    assert "model.layers.1.block_sparse_moe.gate.weight" in names
    assert not any("mlp" in name for name in names)


def test_what_else_is_in_the_folder(tmp_path: Path) -> None:
    dump = save_random(tmp_path / "run", model_tables("llama3"), job={"description": "a run"})
    rows = [{"step": 7, "loss": 2.5}, {"step": 7, "validation_loss": 2.25}, {"step": 8, "loss": 9.0}]
    (dump / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    export(dump, tmp_path / "hf", verified=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("| optimizer steps | 7 |", "| tokens trained on | 7,168 |", "| training loss | 2.5 |", "`d0`", "2.25"):
        assert fact in card
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (0xFE, 0xFF, "float32")
    assert "auto_map" not in config
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0xFF
    assert json.loads((tmp_path / "hf" / "conversion_report.json").read_text())["verified"] is None


def test_rows_that_no_token_has_are_never_generated(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("llama3", vocab_size=300))
    report = export(tmp_path / "run", tmp_path / "hf")
    assert report["verified"]["greedy_equal"]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(256, 300))
