"""One layer: a mixer and a feed-forward branch around the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.attention import Attention
from titan_lite.models.context import Context
from titan_lite.models.ffn import FFN
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module
from titan_lite.models.norm import Norm
from titan_lite.models.residual import Residual


@dataclass(frozen=True)
class Layer:
    """The choices for one layer."""

    block: Block.Config
    attention: Attention.Config
    ffn: FFN.Config
    residual: Residual.Config
    norm: Norm.Config
    linear: Linear.Config
    n_layers: int
    """Executed layers of the whole model."""


class Block(Module):
    """(B, T, D), context -> (B, T, D). The unit of sharding, checkpointing and compilation."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "block"
        default_type: ClassVar[str | None] = "sequential"


class SequentialBlock(Block):
    """x = residual(x, attention); x = residual(x, ffn). Source: arXiv 1706.03762."""

    class Config(Block.Config):
        type: Literal["sequential"] = "sequential"

    def __init__(self, config: Config, dim: int, layer: Layer):
        super().__init__()
        self.attention = layer.attention.build(dim=dim, linear=layer.linear)
        self.ffn = layer.ffn.build(dim=dim, linear=layer.linear)
        self.attention_residual, self.ffn_residual = layer.residual.pair(dim, layer.norm, layer.n_layers)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.attention_residual(x, self.attention, context)
        return self.ffn_residual(x, self.ffn, context)
