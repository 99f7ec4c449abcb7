"""Presets with experts: what of their parameters works on a token, and what no parameter shows."""

from __future__ import annotations

import math

import pytest
import torch

from tests.hf.twins import preset_config
from titan_lite.models.flops import active_parameters
from titan_lite.models.spec import collect_specs

ACTIVE = {
    # arXiv 2401.04088, section 1; the announcement of 8x22B.
    ("mixtral", "8x7B"): 12.9,
    ("mixtral", "8x22B"): 39,
    # arXiv 2505.09388, table 2, whose names round further: A3B, A22B.
    ("qwen3_moe", "30B-A3B"): 3.35,
    ("qwen3_moe", "235B-A22B"): 22.2,
}
"""Billions of parameters that work on a token, as published."""
DEEPSEEK = {"16B": (2.4, 2.5), "236B": (20.5, 21.5), "671B": (36.5, 37.5)}
"""Bounds of the same without the embedding: 2.4, 21 and 37 (arXiv 2405.04434, arXiv 2412.19437)."""
GPT_OSS = {"20b": 3.61, "120b": 5.13}
"""The same without the embedding (arXiv 2508.10925, table 1)."""


def active(name: str, flavor: str) -> int:
    """Without modules for further tokens."""
    config = preset_config(name, flavor, mtp="none")
    with torch.device("meta"):
        model = config.build(vocab_size=config.vocab_size)
    return active_parameters(model, collect_specs(model))


@pytest.mark.parametrize(("name", "flavor"), ACTIVE)
def test_active_parameters_are_the_published_ones(name: str, flavor: str) -> None:
    published = ACTIVE[name, flavor]
    digits = len(str(published).partition(".")[2])
    assert round(active(name, flavor) / 1e9, digits) == published


@pytest.mark.parametrize("flavor", GPT_OSS)
def test_gpt_oss_counts_no_embedding(flavor: str) -> None:
    config = preset_config("gpt_oss", flavor)
    assert round((active("gpt_oss", flavor) - config.vocab_size * config.dim) / 1e9, 2) == GPT_OSS[flavor]


@pytest.mark.parametrize("flavor", DEEPSEEK)
def test_deepseek_counts_no_embedding(flavor: str) -> None:
    config = preset_config("deepseek_v3", flavor)
    least, most = DEEPSEEK[flavor]
    assert least < (active("deepseek_v3", flavor) - config.vocab_size * config.dim) / 1e9 < most


def test_deepseek_v3_is_transformers_default() -> None:
    """Its config class has the size of 671B as its default, with the positions of the first training."""
    from transformers import DeepseekV3Config

    from titan_lite.hf import ARCHITECTURES

    plain = preset_config("deepseek_v3", "671B", attention={"position": {"scaling": "none"}})
    architecture = ARCHITECTURES["deepseek_v3"]
    settings = architecture.settings(plain, plain.vocab_size, 4096)
    published = DeepseekV3Config().to_dict()
    settings = {key: value for key, value in settings.items() if key not in architecture.training_only}
    assert {key: published[key] for key in settings} == settings


def test_latents_of_deepseek_are_what_a_cache_keeps() -> None:
    """Of a token in a layer: 576 numbers, where keys and values of heads would be 40,960."""
    config = preset_config("deepseek_v3", "671B")
    kept = config.attention.kept(config.dim)
    assert [heads * width for heads, width in kept] == [64, 512]
    factor = config.attention.score_scale(config.attention.width(config.dim))
    assert factor == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)


def test_gpt_oss_is_transformers_default() -> None:
    """Its config class has the size of 120b as its default."""
    from transformers import GptOssConfig

    from titan_lite.hf import ARCHITECTURES

    config = preset_config("gpt_oss", "120b")
    settings = ARCHITECTURES["gpt_oss"].settings(config, config.vocab_size, 131072)
    published = GptOssConfig().to_dict()
    rope = settings.pop("rope_parameters")
    assert {key: published[key] for key in settings} == settings
    theirs = {key: value for key, value in published["rope_parameters"].items() if value is not None}
    assert {key: rope[key] for key in theirs} == theirs


def test_windows_of_gpt_oss_take_turns() -> None:
    layers = preset_config("gpt_oss", "20b").each_layer()
    assert [len(layer.attention.masks) for layer in layers] == [2, 1] * 12
