"""Learned scale parameters with an effective learning rate of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_lite.models.module import Module, Total
from titan_lite.models.spec import Spec


class LearnedScale(Module):
    """() -> s (size,) = value * init / scale, where `value` starts at `scale`, so that s starts at `init`.

    Adam moves every parameter by about lr whatever its gradient: s moves by lr * init / scale. Kept in the dtype of the
    masters; a sharded run computes with it in training.mixed_precision_param, as with every parameter.
    Source: arXiv 2410.01131, section 2.5.
    """

    def __init__(self, size: int, init: float, scale: float):
        super().__init__()
        self.size, self.scale = size, scale
        self.factor = init / scale
        self.value = nn.Parameter(torch.empty(size))

    def forward(self) -> Tensor:
        return self.value * self.factor

    def metrics(self, total: Total) -> dict[str, Tensor]:
        """`mean`: of the elements of s."""
        # Half a second to import, and checking a config reads this file too.
        from torch.distributed.tensor import DTensor

        summed = self.value.float().sum()
        whole = summed.full_tensor() if isinstance(summed, DTensor) else summed
        return {"mean": whole * (self.factor / self.size)}

    def param_specs(self) -> dict[str, Spec]:
        return {"value": Spec("scalar", 1, self.size, self.scale)}
