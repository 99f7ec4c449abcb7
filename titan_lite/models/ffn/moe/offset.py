"""Offsets on the scores by which experts are chosen: balance without a loss."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.module import Module, Total
from titan_lite.models.spec import Spec


class Offset(Module):
    """() -> what is added to the scores (E,) where experts are chosen, or None."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "offset"
        default_type: ClassVar[str | None] = "none"

    def move(self, load: Tensor, total: Total) -> None:
        """Told after each step how often this rank's tokens chose each expert (E,)."""


class NoOffset(Offset):
    """Scores choose."""

    class Config(Offset.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_experts: int):
        super().__init__()

    def forward(self) -> None:
        return None


class LoadOffset(Offset):
    """After each step, offset_i += rate * sign(mean load - load_i), the loads counted over the global batch.

    Source: arXiv 2408.15664 (auxiliary-loss-free balancing).
    """

    class Config(Offset.Config):
        type: Literal["load"] = "load"
        rate: PositiveFloat = 1e-3
        """Change of an expert's offset per step."""

    value: Tensor
    """(E,) float32; no gradient ever reaches it."""

    def __init__(self, config: Config, n_experts: int):
        super().__init__()
        self.rate, self.n_experts = config.rate, n_experts
        self.register_buffer("value", torch.empty(n_experts, dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.value

    def move(self, load: Tensor, total: Total) -> None:
        # Loads that are counted twice, as where activations are recomputed, have the same signs.
        load = total(load)
        self.value.add_(self.rate * (load.mean() - load).sign())

    def param_specs(self) -> dict[str, Spec]:
        return {"value": Spec("scalar", 1, self.n_experts, 0.0)}
