"""The norm slot, and the gain that norms share."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.module import OnTokens
from titan_lite.models.spec import Spec

Gain = Literal["vector", "scalar", "none"]


class Norm(OnTokens):
    """(..., D) -> (..., D) in the dtype of the input."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "norm"
        default_type: ClassVar[str | None] = "rmsnorm"


class NoNorm(Norm):
    """y = x."""

    class Config(Norm.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class GainNorm(Norm):
    """A norm whose result is multiplied by a learned gain, which starts at 1."""

    class Config(Norm.Config):
        eps: PositiveFloat = 1e-5
        """Added to the mean square, inside the root."""
        gain: Gain = "vector"
        """Learned factor: `vector`, one per channel; `scalar`, one for all; `none`."""

    def __init__(self, config: Config, dim: int):
        super().__init__()
        self.dim, self.eps = dim, config.eps
        size = {"vector": dim, "scalar": 1, "none": 0}[config.gain]
        self.weight = nn.Parameter(torch.empty(size)) if size else None
        self.gain: Callable[[Tensor | None, int], Tensor | None] = _spread if config.gain == "scalar" else _as_it_is

    def param_specs(self) -> dict[str, Spec]:
        return {} if self.weight is None else {"weight": Spec("norm", 1, self.weight.numel(), 1.0)}


def _as_it_is(weight: Tensor | None, dim: int) -> Tensor | None:
    return weight


def _spread(weight: Tensor | None, dim: int) -> Tensor | None:
    """A view (dim,) of the one gain, which torch's own norms take."""
    assert weight is not None
    return weight.expand(dim)
