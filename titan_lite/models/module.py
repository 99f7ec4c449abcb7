"""Base of everything the model is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from titan_lite.config.component import Component
from titan_lite.models.spec import Spec

Total: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks."""


class Module(nn.Module, Component):
    """An `nn.Module` that a Config builds and that describes its own parameters and buffers."""

    def param_specs(self) -> dict[str, Spec]:
        """{local name: Spec} of the parameters and buffers this very module holds (children describe theirs)."""
        return {}

    def after_step(self, total: Total) -> None:
        """Restores what must hold of this very module's parameters, DTensors maybe. No gradient is recorded."""


@torch.no_grad()
def after_step(model: nn.Module, total: Total) -> None:
    """Runs every module's `after_step`: once the weights are initialised, and after each optimizer step."""
    for module in model.modules():
        if isinstance(module, Module):
            module.after_step(total)
