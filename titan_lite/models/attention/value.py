"""What is mixed into a layer's values."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import OnTokens
from titan_lite.models.spec import Spec

FIRST_VALUES: Final = "first_values"
"""Under this name the values of the first layer are carried."""


class ValueMix(OnTokens):
    """(v (B, G, T, Dv), what earlier layers left and this one may add to) -> v."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "value_mix"
        default_type: ClassVar[str | None] = "none"
        leaves: ClassVar[tuple[str, ...]] = ()
        """The names of what a layer leaves for later ones, shaped like its values."""


class NoValueMix(ValueMix):
    """The layer's own values."""

    class Config(ValueMix.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, v: Tensor, carry: dict[str, Tensor]) -> Tensor:
        return v


class ValueResidual(ValueMix):
    """v' = l1 * v + l2 * v_first, l1 and l2 learned, 0.5 at first; v_first are those of the first layer that mixes.

    v_first is unmixed, and v itself in that first layer, which so starts as v' = v. Source: arXiv 2410.17897.
    """

    class Config(ValueMix.Config):
        type: Literal["residual"] = "residual"
        leaves: ClassVar[tuple[str, ...]] = (FIRST_VALUES,)

    def __init__(self, config: Config):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(2))

    def forward(self, v: Tensor, carry: dict[str, Tensor]) -> Tensor:
        own, first = self.weights.unbind()
        return own * v + first * carry.setdefault(FIRST_VALUES, v)

    def param_specs(self) -> dict[str, Spec]:
        return {"weights": Spec("scalar", 1, 2, 0.5)}
