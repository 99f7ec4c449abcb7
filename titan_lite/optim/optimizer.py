"""The optimizer slot."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from titan_lite.config.component import Component, SlotConfig


class Optimizer(Component):
    """Builds a `torch.optim.Optimizer` over parameter groups (`build(groups)`)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "optimizer"
        default_type: ClassVar[str | None] = "adamw"
        lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8e-4
        """Peak learning rate."""
        weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
        """Decay of matrices and embeddings; gains and biases have none."""
        early_step_in_backward: bool = False
        """Step each parameter as soon as its gradient is there."""

        def build(self, *args: Any, **sizes: Any) -> torch.optim.Optimizer:
            return self.component.create(self, *args, **sizes)  # type: ignore[attr-defined]
