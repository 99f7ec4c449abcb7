"""One layer: a mixer and a feed-forward branch around the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.attention import Attention
from titan_lite.models.context import Context
from titan_lite.models.ffn import FFN
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module
from titan_lite.models.norm import Norm
from titan_lite.models.residual import AdditiveResidual, Residual


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
    """Executed layers of the whole model, on average."""


class Block(Module):
    """(B, T, D), context -> (B, T, D), carry. The unit of sharding, checkpointing and compilation.

    What a layer leaves for later ones goes out beside the stream and comes in with the next layer's context. Left in a
    dict that all layers share, it would be lost where FSDP rebuilds the arguments and found again where a checkpoint
    recomputes.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "block"
        default_type: ClassVar[str | None] = "sequential"

    def __init__(self, config: Config, dim: int, layer: Layer):
        super().__init__()
        self.attention = layer.attention.build(dim=dim, linear=layer.linear)
        self.ffn = layer.ffn.build(dim=dim, linear=layer.linear)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        carry = dict(context.carry)
        return self.run(x, context._replace(carry=carry)), carry

    def run(self, x: Tensor, context: Context) -> Tensor:
        """The layer itself; its branches may add to `context.carry`."""
        raise NotImplementedError


class SequentialBlock(Block):
    """x = residual(x, attention); x = residual(x, ffn). Source: arXiv 1706.03762."""

    class Config(Block.Config):
        type: Literal["sequential"] = "sequential"

    def __init__(self, config: Config, dim: int, layer: Layer):
        super().__init__(config, dim, layer)
        self.attention_residual, self.ffn_residual = layer.residual.pair(dim, layer.norm, layer.n_layers)

    def run(self, x: Tensor, context: Context) -> Tensor:
        x = self.attention_residual(x, self.attention, context)
        return self.ffn_residual(x, self.ffn, context)


class ParallelBlock(Block):
    """x' = x + attention's addition + ffn's addition, both of x and each with a residual of its own: GPT-NeoX.

    Source: arXiv 2204.06745, section 2.1.
    """

    class Config(Block.Config):
        type: Literal["parallel"] = "parallel"

    def __init__(self, config: Config, dim: int, layer: Layer):
        super().__init__(config, dim, layer)
        pair = cast("tuple[AdditiveResidual, AdditiveResidual]", layer.residual.pair(dim, layer.norm, layer.n_layers))
        self.attention_residual, self.ffn_residual = pair

    def run(self, x: Tensor, context: Context) -> Tensor:
        attended = self.attention_residual.delta(x, self.attention, context)
        return x + attended + self.ffn_residual.delta(x, self.ffn, context)


class ParallelSharedNormBlock(Block):
    """x' = residual(x, attention + ffn): both branches read the same norm of x, as in GPT-J and PaLM.

    Source: arXiv 2204.02311, section 2.
    """

    class Config(Block.Config):
        type: Literal["parallel_shared_norm"] = "parallel_shared_norm"

    def __init__(self, config: Config, dim: int, layer: Layer):
        super().__init__(config, dim, layer)
        self.residual = layer.residual.single(dim, layer.norm, layer.n_layers)

    def run(self, x: Tensor, context: Context) -> Tensor:
        return self.residual(x, self.branches, context)

    def branches(self, x: Tensor, context: Context) -> Tensor:
        """Both branches' outputs on the same input (B, T, D), added."""
        return self.attention(x, context) + self.ffn(x, context)
