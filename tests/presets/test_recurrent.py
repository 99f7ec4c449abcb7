"""Presets whose layers run several times."""

from __future__ import annotations

import pytest
import torch

from tests.hf.twins import preset_config
from titan_lite.models.transformer import Transformer

SHARDS_OF_HUGINN = 4.77e9 + 4.74e9 + 4.74e9 + 1.38e9
"""Bytes of huginn-0125's float32 files, which hold the tied embedding twice."""


def built(name: str, flavor: str) -> Transformer:
    config = preset_config(name, flavor)
    with torch.device("meta"):
        return config.build(vocab_size=config.vocab_size)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_huginn_has_the_published_size():
    """8 layers of four D^2 and three D F, biases on q and k and four gains; adapter, embedding and one more gain."""
    D, F, V = 5280, 17920, 65536
    model = built("huginn", "3.5B")
    assert size(model) == 8 * (4 * D * D + 3 * D * F + 2 * D + 4 * D) + 2 * D * D + D + V * D
    assert 4 * (size(model) + V * D) == pytest.approx(SHARDS_OF_HUGINN, rel=2e-3)
    config = preset_config("huginn", "3.5B")
    assert (config.attention.width(D), config.depth()) == (96, 132)  # head_dim, effective_expected_depth of its config


def test_huginn_starts_as_published():
    """init_values of its config.json."""
    from titan_lite.models.init import Like

    config = preset_config("huginn", "3.5B")
    init = config.init.build(dim=config.dim, n_layers=config.depth())
    assert isinstance(init, Like)
    std = (2 / (5 * config.dim)) ** 0.5
    assert std == pytest.approx(0.008703882797784892)
    assert std / (2 * init.n_layers) ** 0.5 == pytest.approx(0.0005356869554443541)
    assert config.embedding.factor(config.dim) == pytest.approx(72.6636084983398)


def test_recurrent_small_is_about_as_large_as_the_seed_s():
    assert size(built("mega", "recurrent_small")) == pytest.approx(120e6, rel=0.03)


def test_ngpt_with_shared_attention_saves_all_but_one_attention():
    whole, shared = built("ngpt", "0.5B"), built("ngpt", "0.5B_shared_attention")
    assert size(whole) - size(shared) == 23 * 4 * 1024**2
