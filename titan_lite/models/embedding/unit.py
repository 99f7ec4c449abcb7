"""Token embeddings of length 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from titan_lite.models.context import Context
from titan_lite.models.embedding.base import Embedding
from titan_lite.models.linear import Linear, length_doubts, to_unit_length
from titan_lite.models.module import Total
from titan_lite.models.spec import Spec


class UnitEmbedding(Embedding):
    """One learned row of length 1 per token, restored after each optimizer step. Source: arXiv 2410.01131 (nGPT)."""

    class Config(Embedding.Config):
        type: Literal["unit"] = "unit"

    def __init__(self, config: Config, vocab_size: int, dim: int, linear: Linear.Config):
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        return self.lookup(tokens, self.weight)

    def after_step(self, total: Total) -> None:
        to_unit_length(self.weight, dim=1)

    def doubts(self) -> dict[str, str]:
        return length_doubts("weight", self.weight, dim=1)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("embed", 1, self.dim)}
