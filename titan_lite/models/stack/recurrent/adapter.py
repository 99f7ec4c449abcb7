"""How the state meets the embedded text before each iteration."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module
from titan_lite.parallel.plan import SEQ, Plan


class Adapter(Module):
    """(state s (B, T, D), what the prelude made e (B, T, D)) -> (B, T, D)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "adapter"
        default_type: ClassVar[str | None] = "concat"


class Concat(Adapter):
    """[s; e] W with W (2D, D). Source: arXiv 2502.05171, section 3.1."""

    class Config(Adapter.Config):
        type: Literal["concat"] = "concat"

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.linear = linear.build(2 * dim, dim)

    def tp_plan(self) -> Plan:
        return {"linear": SEQ}

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        return self.linear(torch.cat((state, e), dim=-1))


class Add(Adapter):
    """s + e. Source: arXiv 2502.05171, section 3.1."""

    class Config(Adapter.Config):
        type: Literal["add"] = "add"

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        return state + e


class Gate(Adapter):
    """s * e, elementwise. Source: github.com/seal-rg/recurrent-pretraining."""

    class Config(Adapter.Config):
        type: Literal["gate"] = "gate"

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        return state * e
