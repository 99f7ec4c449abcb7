"""What embeddings that look rows up in one table have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.errors import Problem
from titan_lite.config.fields import PositiveFloat, Probability
from titan_lite.models.context import Context
from titan_lite.models.dropout import dropout
from titan_lite.models.embedding.base import Embedding
from titan_lite.models.embedding.position import AbsolutePosition, NoAbsolutePosition
from titan_lite.models.embedding.warm_start import NoWarmStart, WarmStart
from titan_lite.models.norm import NoNorm, Norm
from titan_lite.models.spec import Spec

if TYPE_CHECKING:
    from titan_lite.job import Job


class TableEmbedding(Embedding):
    """x0 = dropout(norm(scale * widen(E[id])) + position). A subclass says how a row becomes as wide as the model."""

    class Config(Embedding.Config):
        scale: Literal["sqrt_dim"] | PositiveFloat = 1.0
        """Factor of the rows: a number, or "sqrt_dim" for sqrt(dim)."""
        norm: Norm.Config = NoNorm.Config()
        """Norm of the scaled rows, before positions are added."""
        dropout: Probability = 0.0
        """Probability with which an element of the result is dropped."""
        position: AbsolutePosition.Config = NoAbsolutePosition.Config()
        """Absolute positions, added to the rows."""
        warm_start: WarmStart.Config = NoWarmStart.Config()
        """Rows taken over from another model."""

        def row_width(self, dim: int) -> int:
            """Width of a row of the table, in a model of width `dim`."""
            return dim

        def factor(self, dim: int) -> float:
            """The scale as a number."""
            return dim**0.5 if self.scale == "sqrt_dim" else float(self.scale)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from self.warm_start.misfits(job, self.row_width(job.model.dim))

    def __init__(self, config: Config, vocab_size: int, dim: int):
        super().__init__()
        self.vocab_size, self.width = vocab_size, config.row_width(dim)
        self.source = config.warm_start.build()
        self.weight = nn.Parameter(torch.empty(vocab_size, self.width), requires_grad=not self.source.frozen)
        factor = config.factor(dim)
        self.scale = nn.Identity() if factor == 1 else Scale(factor)
        self.norm = config.norm.build(dim=dim)
        self.position = config.position.build(dim=dim)
        self.dropout = dropout(config.dropout, "embedding")

    def widen(self, rows: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, D)."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        x = self.norm(self.scale(self.widen(self.lookup(tokens, self.weight))))  # (B, T, D)
        return self.dropout(self.position(x, context), context.noise)

    def warm_start(self) -> None:
        self.source.fill(self.weight)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("embed", 1, self.width)}


class Scale(nn.Module):
    """y = c x."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
