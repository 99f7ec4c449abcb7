"""The slot, and the scalings that treat all frequencies alike.

theta is the base of the frequencies f_j = theta^(-2j/d); d says how many numbers of a head are rotated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.errors import Problem
from titan_lite.models.position.rotation import Tables

Stretch = Annotated[float, Field(ge=1, allow_inf_nan=False)]
"""How many times longer than before."""


class Scaling(Component):
    """What becomes of the frequencies, and of the size of what is rotated."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "rope_scaling"
        default_type: ClassVar[str | None] = "none"

        def moves(self) -> bool:
            """Whether frequencies change with the length of the text."""
            return False

        def score_factor(self) -> float:
            """What scores are multiplied by beside the size of what is rotated, where that is a part of a head."""
            return 1.0

        def rotation_problems(self, theta: float, width: int) -> Iterable[Problem]:
            """What is wrong with rotating `width` numbers of a head; keys are relative to the scaling."""
            return ()

    def __init__(self, config: Config, theta: float, width: int):
        self.theta, self.width = theta, width

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        """(width/2,) radians per position in float32, for a text of `length` tokens."""
        return inverse_powers(self.theta, self.width, device)

    def size(self, length: int) -> float:
        """What rotated queries and keys are multiplied by in a text of `length` tokens."""
        return 1.0

    def cos_sin(self, angles: Tensor, length: int) -> Tables:
        """What pairs are turned with, for a text of `length` tokens: `size` is in it."""
        return angles.cos(), angles.sin()


class NoScaling(Scaling):
    """f_j as it is. Source: arXiv 2104.09864."""

    class Config(Scaling.Config):
        type: Literal["none"] = "none"


class LinearScaling(Scaling):
    """f_j / factor: positions are interpolated. Source: arXiv 2306.15595."""

    class Config(Scaling.Config):
        type: Literal["linear"] = "linear"
        factor: Stretch = Field(examples=[8.0])
        """What frequencies are divided by."""

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.factor = config.factor

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        return super().frequencies(length, device) / self.factor


def inverse_powers(theta: float, width: int, device: torch.device) -> Tensor:
    """theta^(-2j/width), (width/2,) in float32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return theta**-exponents
