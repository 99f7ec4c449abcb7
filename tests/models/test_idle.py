"""Settings without effect beside others are refused, and where they have one, they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from titan_lite.config.errors import CROSS_FIELD, ConfigError, Problem
from titan_lite.config.load import job_from_dict

REZERO = {"type": "none", "scale": "rezero"}
MIX = {"attention": {"value_mix": "residual"}}
PER_LAYER = {"scale": {"type": "rezero", "per": "layer"}}
SHARED = "parallel_shared_norm"
CORE = {"type": "recurrent", "prelude": 1, "coda": 1}


def problems(model: dict[str, Any]) -> list[Problem]:
    try:
        job_from_dict({"model": {"dim": 64} | model, "activation_checkpoint": {"mode": "none"}})
    except ConfigError as error:
        return error.problems
    return []


def warnings(model: dict[str, Any], **sections: Any) -> tuple[str, ...]:
    return job_from_dict({"model": {"dim": 64} | model, **sections}).warnings


IDLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "values of one layer": ({"n_layers": 1} | MIX, "model.attention.value_mix.type", "model.n_layers = 1"),
    "values of one of many": (
        {"layers": [{"at": 2} | MIX]},
        "model.layers[0].attention.value_mix.type",
        "layer 2 is the only one",
    ),
    "values of a prelude": (
        {"n_layers": 3, "stack": CORE, "residual": "sandwich_sum", "layers": [{"at": 0} | MIX]},
        "model.layers[0].attention.value_mix.type",
        "layer 0 is the only one",
    ),
    "a norm without a place": (
        {"layers": [{"at": "1,2", "norm": "layernorm", "residual": REZERO}]},
        "model.layers[0].norm.type",
        'model.layers[0].residual.type = "none"',
    ),
    "one scale for both branches": (
        {"block": SHARED, "residual": PER_LAYER},
        "model.residual.scale.per",
        f'model.block.type = "{SHARED}"',
    ),
    "one scale, in a layer": (
        {"residual": PER_LAYER, "layers": [{"at": 1, "block": SHARED}]},
        "model.residual.scale.per",
        f'model.layers[0].block.type = "{SHARED}"',
    ),
    "the wider of two windows": (
        {"attention": {"masks": ["causal", *({"type": "sliding_window", "window": w} for w in (8, 16))]}},
        "model.attention.masks",
        '"sliding_window" twice',
    ),
    "a mask once more, in a layer": (
        {"layers": [{"at": 1, "attention": {"masks": ["causal", "document", "causal"]}}]},
        "model.layers[0].attention.masks",
        '"causal" twice',
    ),
    "a table that is taken back": (
        {"layers": [{"at": 1, "ffn": "mlp"}, {"at": ":", "ffn": {"type": "glu", "hidden": 64}}]},
        "model.layers[0].ffn",
        "later entries",
    ),
    "by two others": (
        {
            "layers": [
                {"at": ":", "ffn": {"hidden": 32}, "linear": "default"},
                {"at": "::2", "ffn": {"hidden": 64}},
                {"at": "1::2", "ffn": {"hidden": 96}},
            ]
        },
        "model.layers[0].ffn",
        "later entries",
    ),
}


@pytest.mark.parametrize(("model", "key", "named"), IDLE.values(), ids=IDLE)
def test_what_has_no_effect_is_refused(model: dict[str, Any], key: str, named: str) -> None:
    (problem,) = problems(model)
    assert (problem.code, problem.key) == (CROSS_FIELD, key)
    assert "has no effect" in problem.why
    assert named in problem.why
    assert problem.allowed


ACTING: dict[str, dict[str, Any]] = {
    "values of two layers": {"n_layers": 2} | MIX,
    "values of two of many": {"layers": [{"at": "1,2"} | MIX]},
    "values of a core": {"n_layers": 3, "stack": CORE, "residual": "sandwich_sum", "layers": [{"at": 1} | MIX]},
    "a norm with a place": {"layers": [{"at": ":", "norm": "layernorm"}, {"at": 1, "residual": REZERO}]},
    "no norm where there is no place": {"layers": [{"at": 1, "norm": "none", "residual": REZERO}]},
    "two norms side by side": {"block": "parallel", "residual": PER_LAYER},
    "a table for some of its layers": {
        "layers": [{"at": ":", "ffn": {"hidden": 32}}, {"at": 1, "ffn": {"hidden": 64}}]
    },
    "a table beside another": {
        "layers": [{"at": ":", "ffn": {"hidden": 32}}, {"at": ":", "ffn": {"activation": "gelu"}}]
    },
    "a table that says what all have": {"layers": [{"at": 1, "ffn": "glu"}]},
}


@pytest.mark.parametrize("model", ACTING.values(), ids=ACTING)
def test_what_has_one_is_not(model: dict[str, Any]) -> None:
    assert problems(model) == []


def test_a_norm_behind_a_norm_is_told() -> None:
    (line,) = warnings({"residual": "post", "final_norm": "rmsnorm"})
    assert line.startswith('model.final_norm.type = "rmsnorm" with model.residual.type = "post"')
    assert warnings({"residual": "post"}) == warnings({"residual": "post", "final_norm": "none"}) == ()
    assert warnings({"residual": "pre", "final_norm": "layernorm"}) == ()
    # The last layer alone decides.
    first, last = ([{"at": at, "residual": "post"}] for at in (0, -1))
    assert warnings({"final_norm": "rmsnorm", "layers": first}) == ()
    (line,) = warnings({"final_norm": "rmsnorm", "layers": last})
    assert "model.layers[0].residual.type" in line


def test_a_frozen_table_at_both_ends_is_told(tmp_path) -> None:
    save_file({"table": torch.zeros(320, 64)}, tmp_path / "warm.safetensors")
    warm = {"type": "file", "path": str(tmp_path / "warm.safetensors"), "tensor": "table"}
    for frozen in (False, True):
        for tied in (False, True):
            embedding = {"warm_start": warm | {"frozen": frozen}}
            told = warnings({"vocab_size": 320, "embedding": embedding, "head": {"tied": tied}})
            assert len([line for line in told if "the output matrix is the same table" in line]) == (frozen and tied)


def test_a_problem_stands_where_it_was_made() -> None:
    """At a key that the entry has, which names the other one."""
    heads = {"n_heads": 8, "n_kv_heads": 2}
    (problem,) = problems({"attention": heads | {"head_dim": 8}, "layers": [{"at": 0, "attention": {"n_heads": 3}}]})
    assert (problem.key, problem.value) == ("model.layers[0].attention.n_heads", 3)
    assert problem.why == "model.attention.n_kv_heads = 2: must divide n_heads (3)"
    assert problem.allowed == "another n_heads, or for model.attention.n_kv_heads: 1, 3"
    dropped = {"attention": heads | {"dropout": 0.1}, "layers": [{"at": 0, "attention": {"kernel": "sdpa"}}]}
    (problem,) = problems(dropped)
    assert (problem.key, problem.value) == ("model.layers[0].attention.kernel", "sdpa")
    assert problem.why.startswith('model.attention.dropout = 0.1: kernel = "sdpa" cannot drop weights')
    own = {"attention": heads, "layers": [{"at": 0, "attention": {"kernel": "sdpa", "dropout": 0.1}}]}
    assert [problem.key for problem in problems(own)] == ["model.layers[0].attention.dropout"]


def test_one_refusal_for_two_rows_about_the_same_keys() -> None:
    (problem,) = problems({"block": "parallel", "residual": "admin"})
    assert problem.key == "model.block.type"
    (problem,) = problems({"block": SHARED, "residual": "admin"})
    assert problem.key == "model.residual.type"
