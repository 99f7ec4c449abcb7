"""What goes into the weights: for each fold a model that only computes the same with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.hf.choose import natives
from titan_lite.hf.export import export
from titan_lite.hf.folds import FOLDS, Shape
from titan_lite.models.transformer import Transformer

UNROLLED = "shared layers, unrolled"
ROWS = "factor of the embedding, in its table"
LOGITS = "factor of the logits, in the output matrix"
BRANCHES = "factors of the branches, in the matrices that end them"
CASES: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "blocks in turn": ("llama3", {"n_layers": 4, "stack": {"type": "shared", "n_unique": 2}}, "llama", [UNROLLED]),
    "matrices of all branches": (
        "qwen3",
        {"n_layers": 3, "stack": {"type": "scheduled", "schedule": [0, 1, 0], "scope": "branches"}},
        "qwen3",
        [UNROLLED],
    ),
    "one gain": ("llama3", {"norm": {"gain": "scalar"}}, "llama", ["gains of one number, as vectors"]),
    "narrow rows, tied": (
        "llama3",
        {"embedding": {"type": "low_rank", "width": 24}, "head": {"tied": True}},
        "llama",
        ["embedding projections, multiplied out"],
    ),
    "narrow rows": (
        "llama3",
        {"embedding": {"type": "low_rank", "width": 24}},
        "llama",
        ["embedding projections, multiplied out"],
    ),
    "normed rows": (
        "llama3",
        {"embedding": {"norm": {"type": "layernorm"}, "scale": 3.0}, "head": {"tied": True}},
        "llama",
        ["norm of the embedding, in its table"],
    ),
    "factors at both ends, tied": (
        "qwen3",
        {"embedding": {"scale": 4.0}, "head": {"tied": True, "logit_scale": {"type": "constant", "value": 0.25}}},
        "qwen3",
        [ROWS, LOGITS],
    ),
    "sinusoids": ("gpt2", {"embedding": {"position": {"type": "sinusoidal"}}}, "gpt2", ["sinusoids, as a table"]),
    "rezero, one for a layer": (
        "llama3",
        {"residual": {"scale": {"type": "rezero", "per": "layer", "lr_multiplier": 2.0}}},
        "llama",
        [BRANCHES],
    ),
    "rezero with biases": ("gpt2", {"residual": {"scale": "rezero"}}, "gpt2", [BRANCHES]),
    "a factor for each channel, of experts": (
        "mixtral",
        {"residual": {"scale": "layerscale"}},
        "mixtral",
        [BRANCHES],
    ),
    "a factor behind a norm": (
        "olmo2",
        {"residual": {"scale": {"type": "constant", "value": "inverse_sqrt_depth"}}},
        "olmo2",
        [BRANCHES],
    ),
    "admin": (
        "opt",
        {"residual": {"type": "admin"}, "head": {"tied": True}},
        "opt",
        ["Admin's omega, in the norms and matrices around it"],
    ),
    "muP without a fold": (
        "llama3",
        {
            "embedding": {"scale": 4.0},
            "attention": {"scale": "inverse"},
            "residual": {"scale": {"type": "constant", "value": 0.5}},
            "head": {"logit_scale": {"type": "constant", "value": 0.25}},
        },
        "granite",
        [],
    ),
    "reversed and interleaved rotation, no fold": (
        "llama3",
        {"attention": {"position": {"direction": "reversed", "layout": "interleaved"}}},
        "llama",
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_folded_model_is_the_model(name: str, tmp_path: Path) -> None:
    preset, changes, model_type, titles = CASES[name]
    save_random(tmp_path / "run", model_tables(preset, **changes), std=0.2)
    report = export(tmp_path / "run", tmp_path / "hf")
    assert (report["model_type"], report["folds"]) == (model_type, titles)
    assert report["verified"]["max_logit_difference"] < 1e-3
    assert report["verified"]["greedy_equal"]


def test_every_fold_has_a_case() -> None:
    assert {fold.title for fold in FOLDS} == {title for *_, titles in CASES.values() for title in titles}


def test_what_cannot_be_folded_stays() -> None:
    for changes in (
        {"residual": {"type": "admin"}, "norm": {"type": "l2"}},
        {"residual": {"scale": "layerscale"}, "ffn": {"type": "peer"}},
    ):
        config = Transformer.Config.model_validate({"dim": 32, "n_layers": 2, **changes})
        with torch.device("meta"):
            assert list(natives(Shape.of(config, 64, 128))) == []
