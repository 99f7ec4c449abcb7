"""Every architecture in further shapes: there with its verification, and back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.checkpoints import save_random
from tests.hf.test_export import FIRST, model_tables, same_bits, tokenizer_for
from titan_lite.hf import ARCHITECTURES
from titan_lite.hf.export import export
from titan_lite.hf.importer import import_folder

LINEAR = {"scaling": {"type": "linear", "factor": 4.0}}
LLAMA3 = {"scaling": {"type": "llama3", "factor": 8.0, "original_max_len": 32}}
YARN = {"scaling": {"type": "yarn", "factor": 4.0, "original_max_len": 32}}


def shape(tied: bool, position: dict[str, Any] | None = None, **attention: Any) -> dict[str, Any]:
    """Four heads of queries; what differs from the family's usual model."""
    place = {} if position is None else {"position": position}
    return {"attention": {"n_heads": 4, **attention, **place}, "head": {"tied": tied}}


WIDE = shape(True, LLAMA3, n_kv_heads=1, head_dim=40)
ALL = shape(False, YARN, n_kv_heads=4)
ONE = shape(True, LLAMA3, n_kv_heads=1)
SOME = shape(False, LINEAR, n_kv_heads=2)
SHAPES: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (),
    "mistral": (WIDE, ALL),
    "qwen2": (ONE, ALL),
    "qwen3": (WIDE, ALL),
    "olmo2": (ONE, ALL),
    "gemma2": (shape(False, YARN, n_kv_heads=1, head_dim=40), shape(True, LINEAR, n_kv_heads=4)),
    "gemma3_text": (
        shape(False, None, n_kv_heads=1, head_dim=40) | {"n_layers": 6},
        shape(True, None, n_kv_heads=4) | {"n_layers": 6},
    ),
    "stablelm": (ONE, SOME),
    "granite": (ONE, ALL),
    "arcee": (shape(False, LLAMA3, n_kv_heads=1, head_dim=40), SOME),
    "gpt2": (shape(False), {"dim": 48, "attention": {"n_heads": 3}}),
    "gpt_neox": (shape(True, LINEAR), shape(False, YARN)),
    "opt": (shape(False), {"residual": "post", "head": {"tied": False}}),
    "mixtral": (WIDE, ALL),
    "qwen3_moe": (WIDE, ALL),
    "gpt_oss": (shape(True, LLAMA3, n_kv_heads=1, head_dim=40), shape(False, YARN, n_kv_heads=4)),
    "deepseek_v3": (
        shape(True, LINEAR, head_dim=24, value_dim=8),
        shape(False, YARN, q_rank=0, head_dim=8, value_dim=20),
    ),
}
"""By model_type: narrow, wide and usual heads; one, some or all heads of keys; tied or not; scaled positions."""
CASES = [(model_type, number) for model_type, shapes in SHAPES.items() for number in range(len(shapes))]


def test_shapes_cover_all_architectures() -> None:
    assert SHAPES.keys() == ARCHITECTURES.keys()  # those of llama are in test_export


@pytest.mark.parametrize(("model_type", "number"), CASES)
def test_there_and_back(model_type: str, number: int, tmp_path: Path) -> None:
    preset, flavor, _ = FIRST[model_type]
    tables = model_tables(preset, flavor, **SHAPES[model_type][number])
    tokenizer = tokenizer_for(model_type, tmp_path / "tokenizer")
    save_random(tmp_path / "run", tables, (torch.float32, torch.bfloat16)[number], tokenizer=tokenizer)
    report = export(tmp_path / "run", tmp_path / "hf")
    assert (report["model_type"], report["folds"]) == (model_type, [])
    seen = report["verified"]
    assert seen["max_logit_difference"] < 1e-4
    assert (seen["greedy_tokens"], seen["greedy_equal"]) == (128, True)
    assert seen["tokenizer_texts"] == 10
    import_folder(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "hf", tmp_path / "again")
