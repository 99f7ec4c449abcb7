"""AdamW."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from titan_lite.config.fields import PositiveFloat
from titan_lite.optim.optimizer import Optimizer


class AdamW(Optimizer):
    """Adam with decoupled weight decay, torch's own implementation. Source: arXiv 1711.05101."""

    class Config(Optimizer.Config):
        type: Literal["adamw"] = "adamw"
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
        """Decay of the mean of the gradients."""
        beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
        """Decay of the mean of the squared gradients."""
        eps: PositiveFloat = 1e-8
        """Added to the root of the mean square."""
        implementation: Literal["fused", "foreach", "for-loop"] = "fused"
        """Which of torch's loops steps the parameters."""

    @staticmethod
    def create(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=config.implementation == "fused",
            foreach=config.implementation == "foreach",
        )
