"""Base of everything the model is made of."""

from __future__ import annotations

from torch import nn

from titan_lite.config.component import Component
from titan_lite.models.spec import Spec


class Module(nn.Module, Component):
    """An `nn.Module` that a Config builds and that describes its own parameters."""

    def param_specs(self) -> dict[str, Spec]:
        """{local name: Spec} of the parameters this very module holds (children describe theirs)."""
        return {}

    def after_step(self) -> None:
        """Runs after each optimizer step, outside autograd."""
