"""The order in which blocks run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.block import Block, Layer
from titan_lite.models.context import Context
from titan_lite.models.module import Module


class Stack(Module):
    """(B, T, D), context -> (B, T, D) through all executed layers."""

    blocks: nn.ModuleDict
    """The distinct blocks by number; a ModuleDict, so that names survive cutting the stack into stages."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "stack"
        default_type: ClassVar[str | None] = "plain"

    def schedule(self) -> Iterator[Block]:
        """The block of each executed layer, in order."""
        raise NotImplementedError


class PlainStack(Stack):
    """Each block once, in order. Source: arXiv 1706.03762, section 3.1."""

    class Config(Stack.Config):
        type: Literal["plain"] = "plain"

    def __init__(self, config: Config, dim: int, layers: Sequence[Layer]):
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): layer.block.build(dim=dim, layer=layer) for i, layer in enumerate(layers)})

    def schedule(self) -> Iterator[Block]:
        return iter(cast("list[Block]", list(self.blocks.values())))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        carry = context.carry
        for i, block in enumerate(self.schedule()):
            x, carry = block(x, context.layer(i, carry))
        return x
