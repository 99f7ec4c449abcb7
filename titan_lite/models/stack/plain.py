"""Every layer has a block of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from titan_lite.models.block import Layer
from titan_lite.models.context import Context
from titan_lite.models.stack.base import Stack, Streams


class PlainStack(Stack):
    """Each block once, in order. Source: arXiv 1706.03762, section 3.1."""

    class Config(Stack.Config):
        type: Literal["plain"] = "plain"

    def __init__(self, config: Config, dim: int, layers: Sequence[Layer]):
        super().__init__(config, layers)
        self.blocks = nn.ModuleDict({str(i): layer.block.build(dim=dim, layer=layer) for i, layer in enumerate(layers)})

    def forward(self, x: Tensor, context: Context) -> Streams:
        carry = context.carry
        trunk = x
        for number, block in self.blocks.items():  # all of them, or those of a pipeline stage
            i, trunk = int(number), x
            x, carry = block(x, context.layer(i, carry))
            context.memory.keep(i, carry)
        return Streams(x, trunk, carry)
