"""What is mixed into a layer's values."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module


class ValueMix(Module):
    """(v (B, G, T, Dv), what earlier layers left) -> v."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "value_mix"
        default_type: ClassVar[str | None] = "none"


class NoValueMix(ValueMix):
    """The layer's own values."""

    class Config(ValueMix.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, v: Tensor, carry: dict[str, Tensor]) -> Tensor:
        return v
