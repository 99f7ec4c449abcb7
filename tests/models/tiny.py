"""Tiny models for tests."""

from __future__ import annotations

from typing import Any

from titan_lite.models.init import initialize
from titan_lite.models.module import after_step
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

VOCAB = 64


def tiny_config(**changes: Any) -> Transformer.Config:
    """Two layers of width 32 with 4 query and 2 key/value heads."""
    tables: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "attention": {"n_heads": 4, "n_kv_heads": 2},
        "ffn": {"hidden": 48},
    }
    return Transformer.Config.model_validate(tables | changes)


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    """An initialised model of `tiny_config`, in eval mode."""
    config = tiny_config(**changes)
    model = config.build(vocab_size=VOCAB)
    initialize(model, collect_specs(model), config.init.build(dim=config.dim, n_layers=config.depth()), seed)
    after_step(model, total=lambda tensor: tensor)
    return model.eval()
