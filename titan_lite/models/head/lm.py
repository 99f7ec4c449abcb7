"""The language-model head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.models.embedding import Embedding
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module

Consume = Callable[[Tensor, Tensor], Tensor]
"""What becomes of the hidden states (B, T, D), given the output matrix (V, D): the logits, or a loss."""


def all_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The `Consume` of inference: logits (B, T, V)."""
    return F.linear(x, weight)


class Head(Module):
    """(hidden states (B, T, D), embedding, consume) -> whatever `consume` makes of them.

    The loss runs inside the head's forward: a sharded head is gathered once, and logits need never exist as a whole.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "head"
        default_type: ClassVar[str | None] = "lm"
        tied: bool = False
        """Use the token embedding as the output matrix."""


class LMHead(Head):
    """logits = x W^T with a matrix W of its own."""

    class Config(Head.Config):
        type: Literal["lm"] = "lm"

        def build(self, *args: Any, **sizes: Any) -> LMHead:
            return (TiedLMHead if self.tied else LMHead)(self, *args, **sizes)

    def __init__(self, config: Config, dim: int, vocab_size: int, linear: Linear.Config):
        super().__init__()
        self.output = linear.build(dim, vocab_size, role="head")

    def forward(self, x: Tensor, embedding: Embedding, consume: Consume) -> Tensor:
        return consume(x, self.output.weight)


class TiedLMHead(LMHead):
    """logits = x E^T with the embedding matrix E, which stays the embedding's. Source: arXiv 1608.05859."""

    def __init__(self, config: LMHead.Config, dim: int, vocab_size: int, linear: Linear.Config):
        super(LMHead, self).__init__()

    def forward(self, x: Tensor, embedding: Embedding, consume: Consume) -> Tensor:
        return consume(x, embedding.weight)
