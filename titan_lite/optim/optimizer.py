"""The optimizer slot."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.fields import NonNegativeFloat, PositiveFloat


class Optimizer(Component):
    """Builds a `torch.optim.Optimizer` over parameter groups (`build(groups)`)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "optimizer"
        default_type: ClassVar[str | None] = "adamw"
        lr: PositiveFloat = 8e-4
        """Peak learning rate."""
        weight_decay: NonNegativeFloat = 0.1
        """Decay of matrices and embeddings; gains and biases have none."""
        early_step_in_backward: bool = False
        """Step each parameter as soon as its gradient is there."""

        def build(self, *args: Any, **sizes: Any) -> torch.optim.Optimizer:
            return self.component.create(self, *args, **sizes)  # type: ignore[attr-defined]
