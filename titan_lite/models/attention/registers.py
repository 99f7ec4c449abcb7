"""Learned keys and values that stand before those of the tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveInt
from titan_lite.models.module import Module
from titan_lite.models.position import Position
from titan_lite.models.spec import Gaussian, Spec
from titan_lite.parallel.plan import Plan, kv_heads


class Registers(Module):
    """(keys (B, G, S, Dh) with their positions, values (B, G, S, Dv), position encoding, length of the text) -> both
    with n more in front.

    Kernels let every query see the first n keys, whatever masks say, and add no bias to their scores: `Scoring`. Built
    as `build(n_kv_heads=, head_dim=, value_dim=)`.
    """

    n: int = 0

    class Config(SlotConfig):
        slot: ClassVar[str] = "registers"
        default_type: ClassVar[str | None] = "none"


class NoRegisters(Registers):
    """The tokens' keys and values."""

    class Config(Registers.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_kv_heads: int, head_dim: int, value_dim: int):
        super().__init__()

    def forward(self, k: Tensor, v: Tensor, position: Position, length: int) -> tuple[Tensor, Tensor]:
        return k, v


class LearnedRegisters(Registers):
    """n learned keys and values in each key/value head, both from N(0, 1 / Dh) at first, that every query sees.

    They have no position and no norm, and are no part of a cache. A position encoding that multiplies keys by a number
    multiplies them too; so do gains of a qk_norm that act on queries behind the rotation (nGPT's). Source:
    LSWTransformer (github.com/Avelina9X/memory-transformer-pt4); memory key/values: arXiv 1907.01470.
    """

    class Config(Registers.Config):
        type: Literal["learned"] = "learned"
        n: PositiveInt = Field(examples=[4])
        """Registers in each key/value head."""

    def __init__(self, config: Config, n_kv_heads: int, head_dim: int, value_dim: int):
        super().__init__()
        self.n, self.n_kv_heads, self.head_dim = config.n, n_kv_heads, head_dim
        self.k = nn.Parameter(torch.empty(n_kv_heads, config.n, head_dim))
        self.v = nn.Parameter(torch.empty(n_kv_heads, config.n, value_dim))

    def tp_plan(self) -> Plan:
        return dict.fromkeys(("k", "v"), kv_heads(self.n_kv_heads))

    def forward(self, k: Tensor, v: Tensor, position: Position, length: int) -> tuple[Tensor, Tensor]:
        keys = position.resting(self.k, length).to(k.dtype)
        return _before(k, keys), _before(v, self.v.to(v.dtype))

    def param_specs(self) -> dict[str, Spec]:
        start = Gaussian(self.head_dim**-0.5)
        return {"k": Spec("scalar", 1, self.k.shape[2], start), "v": Spec("scalar", 1, self.v.shape[2], start)}


def _before(x: Tensor, registers: Tensor) -> Tensor:
    """(B, G, S, n) with the registers (G, R, n) before each row's: (B, G, R + S, n)."""
    return torch.cat((registers.expand(x.shape[0], *registers.shape), x), dim=2)
