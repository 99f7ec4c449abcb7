"""What an architecture has no place for is refused, in both directions, with the key."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hf.twins import CONTEXT, VOCAB, preset_config
from titan_lite.config.errors import ConfigError, show
from titan_lite.hf import ARCHITECTURES

WINDOW = {"type": "sliding_window", "window": 8}
NO_PLACE: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "another placement": (
        "llama",
        "llama3",
        {"residual": "post"},
        {"residual.type": '"pre"', "final_norm.type": '"rmsnorm"'},
    ),
    "another norm": (
        "qwen3",
        "qwen3",
        {"norm": {"type": "layernorm"}},
        {"norm.type": '"rmsnorm"', "final_norm.type": '"rmsnorm"'},
    ),
    "a window": ("llama", "mistral", {}, {"attention.masks": '[{type = "causal"}]'}),
    "two windows": (
        "gemma2",
        "gemma2",
        {
            "layers": [
                {"at": "1", "attention": {"masks": ["causal", WINDOW]}},
                {"at": "0", "attention": {"masks": ["causal", WINDOW | {"window": 9}]}},
            ]
        },
        {"attention.masks": '[{type = "causal"}, {type = "sliding_window", window = 9}]'},
    ),
    "a window in some layers": (
        "mistral",
        "mistral",
        {"layers": [{"at": "1", "attention": {"masks": ["causal"]}}]},
        {"attention.masks": '[{type = "causal"}, {type = "sliding_window", window = 32}]'},
    ),
    "normalised heads": ("llama", "qwen3", {}, {"attention.qk_norm.type": '"none"'}),
    "two eps": (
        "qwen3",
        "qwen3",
        {"attention": {"qk_norm": {"eps": 1e-3}}},
        {"norm.eps": "0.001", "final_norm.eps": "0.001"},
    ),
    "a part of each head": (
        "llama",
        "llama3",
        {"attention": {"position": {"fraction": 0.5}}},
        {"attention.position.fraction": "1.0"},
    ),
    "no positions": (
        "llama",
        "llama3",
        {"attention": {"position": "none"}},
        {"attention.position.type": '"rope"'},
    ),
    "an unknown scaling": (
        "llama",
        "llama3",
        {"attention": {"position": {"scaling": {"type": "ntk", "factor": 2.0}}}},
        {"attention.position.scaling.type": '"none"'},
    ),
    "a head with a bias": ("llama", "llama3", {"head": {"bias": True}}, {"head.bias": "false"}),
    "grouped queries": ("gpt2", "gpt2", {"attention": {"n_kv_heads": 2}}, {"attention.n_kv_heads": "8"}),
    "a scale that no whole number gives": (
        "gemma3_text",
        "gemma3",
        {"attention": {"scale": 0.3}},
        {"attention.scale": str(11**-0.5)},
    ),
    "a learned scale": (
        "granite",
        "granite",
        {"head": {"logit_scale": {"type": "learned"}}},
        {"head.logit_scale.type": '"none"'},
    ),
    "multipliers": (
        "llama",
        "granite",
        {},
        {"embedding.scale": "1.0", "residual.scale.type": '"none"', "head.logit_scale.type": '"none"'},
    ),
    "a bias too many": (
        "qwen2",
        "qwen2",
        {"attention": {"bias": ["q", "k", "v", "o"]}},
        {"attention.bias": '["k", "q", "v"]'},
    ),
    "experts that are chosen otherwise": (
        "deepseek_v3",
        "deepseek_v3",
        {"ffn": {"router": {"type": "softmax"}}},
        {"ffn.router.type": '"sigmoid"'},
    ),
    "a dense layer behind others": (
        "deepseek_v3",
        "deepseek_v3",
        {"layers": [{"at": 2, "ffn": {"type": "glu", "hidden": 256}}]},
        {"ffn.type": '"glu"'},
    ),
    "modules that read another state": ("deepseek_v3", "deepseek_v3", {"mtp": "modules"}, {"mtp.reads": '"normed"'}),
    "heads beside each other": ("deepseek_v3", "deepseek_v3", {"mtp": "heads"}, {"mtp.type": '"none"'}),
    "modules without experts": (
        "deepseek_v3",
        "deepseek_v3",
        {"mtp": "modules", "layers": [{"at": ":", "ffn": {"type": "glu", "hidden": 256}}]},
        {"mtp.type": '"none"'},
    ),
    "modules of a dense family": ("llama", "llama3", {"mtp": "modules"}, {"mtp.type": '"none"'}),
    "a part of a shared expert": (
        "deepseek_v3",
        "deepseek_v3",
        {"ffn": {"shared_hidden": 40}},
        {"ffn.shared_hidden": "32"},
    ),
    "two widths of dense layers": (
        "qwen3_moe",
        "qwen3_moe",
        {
            "layers": [
                {"at": 0, "ffn": {"type": "glu", "hidden": 64}},
                {"at": 2, "ffn": {"type": "glu", "hidden": 96}},
            ]
        },
        {"ffn.hidden": "64"},
    ),
    "a bias on queries of the input": (
        "deepseek_v3",
        "deepseek_v3",
        {"attention": {"q_rank": 0, "bias": ["q"]}},
        {"attention.bias": '["kv", "o"]'},
    ),
    "latents that a gate follows": (
        "deepseek_v3",
        "deepseek_v3",
        {"attention": {"gate": "head"}},
        {"attention.gate.type": '"none"'},
    ),
    "a wide head": (
        "qwen2",
        "qwen2",
        {"attention": {"head_dim": 32}},
        {"attention.head_dim": "16", "attention.value_dim": "16"},
    ),
}
"""Name: (model_type, preset, changes, {key below model: what would have a place})."""


@pytest.mark.parametrize("name", NO_PLACE)
def test_a_model_without_a_place_is_refused(name: str) -> None:
    model_type, preset, changes, expected = NO_PLACE[name]
    with pytest.raises(ConfigError) as caught:
        ARCHITECTURES[model_type].settings(preset_config(preset, **changes), VOCAB, CONTEXT)
    assert {p.key: p.allowed for p in caught.value.problems} == {f"model.{key}": a for key, a in expected.items()}
    for problem in caught.value.problems:
        assert problem.why == f"has no place in the Hugging Face architecture {model_type}"
        assert show(problem.value) != problem.allowed


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("preset", ["ngpt", "from_scratch", "lswt"])
def test_models_of_their_own_are_refused_everywhere(model_type: str, preset: str) -> None:
    with pytest.raises(ConfigError):
        ARCHITECTURES[model_type].settings(preset_config(preset), VOCAB, CONTEXT)


UNKNOWN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "activation": ("llama", "llama3", {"hidden_act": "mish"}, "hidden_act"),
    "scaling": (
        "llama",
        "llama3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}},
        "rope_parameters",
    ),
    "part of a layer": ("stablelm", "stablelm", {"qk_layernorm": True}, "qk_layernorm"),
    "affine": ("opt", "opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    "tokens that see all others": (
        "gemma3_text",
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "kind of layer": ("qwen2", "qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_setting_without_a_place_is_refused(name: str) -> None:
    model_type, preset, changes, key = UNKNOWN[name]
    architecture = ARCHITECTURES[model_type]
    settings = architecture.settings(preset_config(preset), VOCAB, CONTEXT)
    architecture.tables(settings)
    with pytest.raises(ConfigError) as caught:
        architecture.tables(settings | changes)
    assert [(p.key, p.value) for p in caught.value.problems] == [(key, changes[key])]


def test_other_names_of_an_activation_are_known() -> None:
    gpt2 = ARCHITECTURES["gpt2"]
    settings = gpt2.settings(preset_config("gpt2"), VOCAB, CONTEXT)
    published = settings | {"activation_function": "gelu_new", "n_inner": None}
    assert gpt2.tables(published) == gpt2.tables(settings)


def test_a_damaged_config_is_no_traceback() -> None:
    llama = ARCHITECTURES["llama"]
    settings = llama.settings(preset_config("llama3"), VOCAB, CONTEXT)
    with pytest.raises(ConfigError, match="rope_parameters\n    is missing in this config of a llama model"):
        llama.tables({key: value for key, value in settings.items() if key != "rope_parameters"})
    with pytest.raises(ConfigError, match=r"model.attention.n_heads = 0\n    cannot be made of this config"):
        llama.tables(settings | {"num_attention_heads": 0})
