"""One attention by itself, random weights in all its parameters, on random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import tiny_config
from titan_lite.models.attention import GroupedAttention
from titan_lite.models.context import Context

B, T, D = 2, 11, 32


def attention(seed: int = 0, **table: Any) -> GroupedAttention:
    """The attention that a `[model.attention]` table describes, in a model of width D."""
    config = tiny_config(attention=table)
    module = config.attention.build(dim=D, linear=config.linear)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=D**-0.5, generator=generator)
    return module


def context_for(module: GroupedAttention, n_tokens: int = T) -> Context:
    """What a forward over `n_tokens` tells it."""
    context = tiny_config().build(vocab_size=1).context(torch.zeros(B, n_tokens, dtype=torch.long))
    return context._replace(prepared={part.key: part.prepare(context) for part in module.shared()})


def run(module: GroupedAttention, x: Tensor) -> Tensor:
    """Its output (B, T, D) on x (B, T, D)."""
    return module(x, context_for(module, x.shape[1]))


def inputs(seed: int = 1) -> Tensor:
    """(B, T, D)."""
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
