"""Token embeddings as wide as the model."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from titan_lite.models.embedding.table import TableEmbedding
from titan_lite.models.linear import Linear


class TokenEmbedding(TableEmbedding):
    """One learned row of the model's width per token. Source: arXiv 1706.03762, section 3.4."""

    class Config(TableEmbedding.Config):
        type: Literal["token"] = "token"

    def __init__(self, config: Config, vocab_size: int, dim: int, linear: Linear.Config):
        super().__init__(config, vocab_size, dim)

    def widen(self, rows: Tensor) -> Tensor:
        return rows
