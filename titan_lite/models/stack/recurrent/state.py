"""What the state is before the first iteration."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.context import Context
from titan_lite.models.dropout import Draw, Noise
from titan_lite.models.module import Module


class State(Module):
    """What the prelude made e (B, T, D), context -> s_0 (B, T, D)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "state"
        default_type: ClassVar[str | None] = "like"


class NoState(State):
    """s_0 = e."""

    class Config(State.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, e: Tensor, context: Context) -> Tensor:
        return e


class Zero(State):
    """s_0 = 0. Source: github.com/seal-rg/recurrent-pretraining."""

    class Config(State.Config):
        type: Literal["zero"] = "zero"

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, e: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(e)


class RandomState(State):
    """s_0 drawn for each element from (seed, step, global row, position, feature), whatever the layout.

    Outside training from position and feature alone: a text has the same state in any row, and however it is cut.
    """

    def __init__(self, config: State.Config, dim: int):
        super().__init__()
        self.dim = dim
        self.draw = Draw("state")

    def forward(self, e: Tensor, context: Context) -> Tensor:
        number = context.own_positions[:, None] * self.dim + torch.arange(self.dim, device=e.device)  # (T, D)
        bits = self.draw.bits_of(self.noise(context), number.flatten().to(torch.int32))
        # Odd multiples of 2^-24 from -1 to 1, without the ends: exact in float32, and no normal is infinite.
        uniform = (2 * (bits >> 8) + 1).float() * 2.0**-24
        return self.shaped(uniform.unflatten(-1, number.shape)).type_as(e).expand_as(e)  # (B, T, D)

    def noise(self, context: Context) -> Noise:
        """What is drawn from."""
        if context.noise is not None:
            return context.noise
        nothing = torch.zeros(1, dtype=torch.int64, device=context.positions.device)
        return Noise(nothing[0], nothing)

    def shaped(self, uniform: Tensor) -> Tensor:
        """The distribution, from numbers that are uniform between -1 and 1."""
        raise NotImplementedError


def normal(uniform: Tensor, cutoff: float = math.inf) -> Tensor:
    """N(0, 1) cut at `cutoff`, from numbers that are uniform between -1 and 1."""
    return math.sqrt(2) * torch.erfinv(uniform * math.erf(cutoff / math.sqrt(2)))


class Like(RandomState):
    """N(0, 2/5) cut at 3 standard deviations: embeddings as `init.type = "like"` makes them, scaled by sqrt(D).

    Source: arXiv 2502.05171, section 3.2.
    """

    class Config(State.Config):
        type: Literal["like"] = "like"

    def shaped(self, uniform: Tensor) -> Tensor:
        return math.sqrt(2 / 5) * normal(uniform, cutoff=3.0)


class Normal(RandomState):
    """N(0, 1). Source: github.com/seal-rg/recurrent-pretraining."""

    class Config(State.Config):
        type: Literal["normal"] = "normal"

    def shaped(self, uniform: Tensor) -> Tensor:
        return normal(uniform)


class Embed(RandomState):
    """N(0, 1/D). Source: github.com/seal-rg/recurrent-pretraining."""

    class Config(State.Config):
        type: Literal["embed"] = "embed"

    def shaped(self, uniform: Tensor) -> Tensor:
        return self.dim**-0.5 * normal(uniform)


class Unit(RandomState):
    """N(0, 1), then each token's mean brought to 0 and its standard deviation to 1.

    Source: github.com/seal-rg/recurrent-pretraining.
    """

    class Config(State.Config):
        type: Literal["unit"] = "unit"

    def shaped(self, uniform: Tensor) -> Tensor:
        variance, mean = torch.var_mean(drawn := normal(uniform), dim=-1, correction=0, keepdim=True)
        return (drawn - mean) * variance.rsqrt()
