"""Token embeddings."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.models.context import Context
from titan_lite.models.module import Module
from titan_lite.models.spec import Spec


class Embedding(Module):
    """Token ids (B, T), context -> (B, T, D). Holds `weight` (V, D), which a tied head reads."""

    weight: nn.Parameter

    class Config(SlotConfig):
        slot: ClassVar[str] = "embedding"
        default_type: ClassVar[str | None] = "token"


class TokenEmbedding(Embedding):
    """One learned row per token."""

    class Config(Embedding.Config):
        type: Literal["token"] = "token"

    def __init__(self, config: Config, vocab_size: int, dim: int):
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        return F.embedding(tokens, self.weight)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("embed", 1, self.dim)}
