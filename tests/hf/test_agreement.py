"""Every preset family against transformers' own implementation, on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.hf.twins import VOCAB, Twins, preset_config, random_tokens, routing_margin, state, twins
from titan_lite.hf import ARCHITECTURES, from_hf, to_hf
from titan_lite.hf.normal_form import absorbed, differences, normal_form
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
"""Logits of a few units, three layers, fp32."""
GRADIENT_ATOL = 1e-5
"""In units of the largest element of all gradients."""
MARGIN = 1e-5
"""Between scores of an expert that is chosen and one that is not: a hundred times their rounding."""

FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "gpt2", "", {}),
    "llama2": ("llama", "llama2", "", {}),
    "llama3": ("llama", "llama3", "", {"norm": {"eps": 1e-3}}),
    "mistral": ("mistral", "mistral", "", {}),
    "mistral without window": ("mistral", "mistral", "", {"attention": {"masks": ["causal"]}}),
    "qwen2": ("qwen2", "qwen2", "", {"head": {"tied": True}}),
    "qwen3": ("qwen3", "qwen3", "", {}),
    "olmo2": ("olmo2", "olmo2", "", {}),
    "gemma2": (
        "gemma2",
        "gemma2",
        "",
        {"attention": {"score": {"cap": 2.0}, "scale": 0.25}, "head": {"logit_cap": {"cap": 3.0}}},
    ),
    "gemma3": ("gemma3_text", "gemma3", "", {"n_layers": 7}),
    "gpt_neox": ("gpt_neox", "gpt_neox", "", {}),
    "gpt_neox, one branch after the other": ("gpt_neox", "gpt_neox", "", {"block": "sequential"}),
    "opt": ("opt", "opt", "", {}),
    "opt 350m": ("opt", "opt", "debug350m", {}),
    "stablelm": ("stablelm", "stablelm", "", {}),
    "granite": ("granite", "granite", "", {}),
    "mixtral": ("mixtral", "mixtral", "", {}),
    "qwen3_moe": ("qwen3_moe", "qwen3_moe", "", {}),
    "qwen3_moe, weights as they are": ("qwen3_moe", "qwen3_moe", "", {"ffn": {"router": {"normalize": False}}}),
    "qwen3_moe, some layers dense": (
        "qwen3_moe",
        "qwen3_moe",
        "",
        {"n_layers": 4, "layers": [{"at": "1::2", "ffn": {"type": "glu", "hidden": 96}}]},
    ),
    "deepseek_v3": ("deepseek_v3", "deepseek_v3", "", {}),
    "deepseek_v3, queries of the input": ("deepseek_v3", "deepseek_v3", "", {"attention": {"q_rank": 0}}),
    "deepseek_v3, stretched from the middle": (
        "deepseek_v3",
        "deepseek_v3",
        "",
        {"attention": {"position": {"theta": 100.0, "scaling": {"original_max_len": 32, "mscale": 0.7}}}},
    ),
    "deepseek_v3, not stretched": ("deepseek_v3", "deepseek_v3", "", {"attention": {"position": {"scaling": "none"}}}),
    "deepseek_v3, one group": (
        "deepseek_v3",
        "deepseek_v3",
        "",
        {
            "n_layers": 2,
            "ffn": {"router": {"n_groups": 1, "top_groups": 1, "normalize": False}},
            "norm": {"eps": 1e-3},
        },
    ),
    "deepseek_v3, other sizes": (
        "deepseek_v3",
        "deepseek_v3",
        "",
        {
            "attention": {"bias": ["q", "kv", "o"], "value_dim": 12, "position": {"layout": "half_split"}},
            "ffn": {"shared_hidden": 96},
            "layers": [],
        },
    ),
    "gpt_oss": ("gpt_oss", "gpt_oss", "", {"ffn": {"experts": {"limit": 1.0}}}),
    "mega": ("llama", "mega", "", {}),
    "mega gpt2_small": ("gpt2", "mega", "gpt2_small", {"dim": 96, "ffn": {"hidden": 160}}),
    "mu": ("arcee", "mu", "", {}),
}
"""Name: (transformers' model_type, preset, flavor, what is changed so that each part shows)."""


def family_twins(name: str) -> Twins:
    model_type, preset, flavor, changes = FAMILIES[name]
    # Three layers are no default of either side, which could stand in for what was forgotten.
    return twins(model_type, preset_config(preset, flavor, **({"n_layers": 3} | changes)))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    pair = family_twins(name)
    assert routing_margin(pair.ours, random_tokens()) > MARGIN
    ours, theirs = pair.logits(random_tokens())
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    _back_is_where_we_were(pair)


def _back_is_where_we_were(pair: Twins) -> None:
    """Weights and config as read from the twin are those it was made of."""
    weights = state(pair.ours)
    back = dict(from_hf(pair.rules, dict(pair.theirs.state_dict())))
    assert back.keys() == weights.keys()
    for name, parameter in weights.items():
        torch.testing.assert_close(back[name], parameter, atol=1e-6, rtol=0)
    tables = pair.architecture.tables(pair.theirs.config.to_dict())
    assert tables["vocab_size"] == VOCAB
    image = normal_form(Transformer.Config.model_validate(tables))
    assert list(differences(absorbed(normal_form(pair.config), image), image)) == []


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "opt 350m", "mixtral", "gpt_oss", "deepseek_v3"])
def test_gradients_are_those_of_transformers(name: str) -> None:
    pair = family_twins(name)
    tokens = random_tokens(40)
    for model, logits in ((pair.ours, pair.ours(tokens)), (pair.theirs, pair.theirs(tokens).logits)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert all(p.grad is not None for p in model.parameters())
    # Without gains that are stored otherwise, a gradient turns into theirs as its weight does.
    gradients = {name: p.grad for name, p in pair.ours.named_parameters()}
    theirs = {name: p.grad for name, p in pair.theirs.named_parameters()}
    found = dict(to_hf((rule for rule in pair.rules if set(rule.ours) <= gradients.keys()), gradients))
    assert found.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, theirs[name], atol=GRADIENT_ATOL * largest, rtol=0)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {"type": "llama3", "factor": 8.0, "original_max_len": 32, "high_freq_factor": 3.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_len": 32, "beta_fast": 16.0},
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_positions(scaling: str) -> None:
    position = {"theta": 100.0, "scaling": SCALINGS[scaling]}
    pair = twins("llama", preset_config("llama3", n_layers=2, attention={"position": position}))
    ours, theirs = pair.logits(random_tokens())
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    _back_is_where_we_were(pair)
    plain = twins("llama", preset_config("llama3", n_layers=2, attention={"position": {"theta": 100.0}}))
    assert (plain.logits(random_tokens())[0] - ours).abs().max() > 0.1


SWAPPED = {"position": {"layout": "interleaved", "direction": "reversed"}}
LIBERTIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one matrix for q, k, v": ("llama", "llama3", {"attention": {"type": "gqa_fused", "n_heads": 8, "n_kv_heads": 4}}),
    "one matrix with a bias": (
        "qwen2",
        "qwen2",
        {"attention": {"type": "gqa_fused", "n_heads": 8, "n_kv_heads": 2, "bias": ["q", "k", "v"]}},
    ),
    "one matrix, fused there too": (
        "gpt_neox",
        "gpt_neox",
        {"attention": {"type": "gqa_fused", "n_heads": 4, "bias": ["q", "k", "v", "o"]}},
    ),
    "neighbours as pairs": ("llama", "llama3", {"attention": {"position": {"layout": "interleaved"}}}),
    "counting down": ("llama", "llama3", {"attention": {"position": {"direction": "reversed"}}}),
    "both, with normalised heads": ("qwen3", "qwen3", {"attention": SWAPPED}),
    "both, normalised as a whole": ("olmo2", "olmo2", {"attention": SWAPPED}),
    "both, in a part of each head": ("gpt_neox", "gpt_neox", {"attention": SWAPPED}),
    "another factor of the scores": ("llama", "llama3", {"attention": {"scale": 0.1}}),
    "no gains": ("gemma2", "gemma2", {"norm": {"gain": "none"}}),
    "no gains and offsets": ("gpt2", "gpt2", {"norm": {"gain": "none", "bias": False}}),
    "latent keys, turned otherwise": (
        "deepseek_v3",
        "deepseek_v3",
        {"attention": {"position": {"layout": "half_split", "direction": "reversed"}}},
    ),
    "latent keys, counting down": (
        "deepseek_v3",
        "deepseek_v3",
        {"attention": {"position": {"direction": "reversed"}}},
    ),
    "latent keys, another factor of the scores": ("deepseek_v3", "deepseek_v3", {"attention": {"scale": 0.3}}),
    "latents without gains": ("deepseek_v3", "deepseek_v3", {"attention": {"latent_norm": {"gain": "none"}}}),
    "no offsets": ("deepseek_v3", "deepseek_v3", {"ffn": {"offset": "none"}}),
    "fewer biases": ("gpt2", "gpt2", {"attention": {"bias": ["v"]}, "ffn": {"bias": False}}),
}
"""What our models may do and theirs not, and yet compute: the exported weights make up for it."""


@pytest.mark.parametrize("name", LIBERTIES)
def test_weights_make_up_for_liberties(name: str) -> None:
    model_type, preset, changes = LIBERTIES[name]
    pair = twins(model_type, preset_config(preset, n_layers=2, **changes))
    ours, theirs = pair.logits(random_tokens(40))
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    back = dict(from_hf(pair.rules, dict(pair.theirs.state_dict())))
    for name, parameter in state(pair.ours).items():
        torch.testing.assert_close(back[name], parameter, atol=1e-6, rtol=0)


def test_one_rule_for_every_tensor() -> None:
    for model_type, preset, flavor, _ in FAMILIES.values():
        config = preset_config(preset, flavor)
        rules = ARCHITECTURES[model_type].rules(config)
        with torch.device("meta"):
            names = list(state(config.build(vocab_size=VOCAB)))
        assert sorted(name for rule in rules for name in rule.ours) == sorted(names)
        theirs = [name for rule in rules for name in rule.theirs]
        assert len(theirs) == len(set(theirs))
        assert max(len(rule.ours) for rule in rules) <= 3
