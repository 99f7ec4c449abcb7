"""Token embeddings of another width than the model's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.fields import PositiveInt
from titan_lite.models.embedding.table import TableEmbedding
from titan_lite.models.linear import Linear
from titan_lite.parallel.plan import SEQ, Plan


class LowRankEmbedding(TableEmbedding):
    """x0 = norm(E[id] W_in) with E (V, width) and W_in (width, D), without a bias.

    A head that is tied to it has a matrix W_out (D, width) of its own: logits = (x W_out) E^T.
    Source: arXiv 1909.11942, section 3.1, and 2205.01068 (OPT-350m) for the tied output.
    """

    class Config(TableEmbedding.Config):
        type: Literal["low_rank"] = "low_rank"
        width: PositiveInt = Field(examples=[512])
        """Width of a row of the table."""

        def row_width(self, dim: int) -> int:
            return self.width

    def __init__(self, config: Config, vocab_size: int, dim: int, linear: Linear.Config):
        super().__init__(config, vocab_size, dim)
        self.dim = dim
        # As an input matrix: what it sums over does not grow with the model.
        self.wide = linear.build(self.width, dim, role="embed")

    def tp_plan(self) -> Plan:
        return {**super().tp_plan(), "wide": SEQ}

    def widen(self, rows: Tensor) -> Tensor:
        return self.wide(rows)

    def make_narrowing(self, linear: Linear.Config) -> nn.Module:
        return linear.build(self.dim, self.width, role="head")
