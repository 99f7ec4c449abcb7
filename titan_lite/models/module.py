"""Base of everything the model is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from titan_lite.config.component import Component
from titan_lite.models.ranks import ALONE, Ranks
from titan_lite.models.spec import Spec
from titan_lite.parallel.plan import SEQ, ExpertPlan, Plan

if TYPE_CHECKING:
    from titan_lite.models.ffn.dispatch import Dispatch

logger = logging.getLogger(__name__)

Total: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over the rows of the global batch, and so over ranks."""


class Module(nn.Module, Component):
    """An `nn.Module` that a Config builds and that describes its own parameters and buffers."""

    weighs_tokens: ClassVar[bool] = False
    """Whether this module's forward asks for `context.token_weight`: it adds losses, or counts in training."""

    def param_specs(self) -> dict[str, Spec]:
        """{local name: Spec} of the parameters and buffers this very module holds (children describe theirs)."""
        return {}

    ranks: Ranks = ALONE
    """Those that share this module, each with a part of it."""

    def tp_plan(self) -> Plan:
        """How this module's own parameters and its children are split over tensor-parallel ranks.

        A child that is given a style is split by it with all that is in it; the others have plans of their own.
        """
        return {}

    def split(self, ranks: Ranks) -> None:
        """Told once, before any forward, that this is one rank's part of the module."""
        self.ranks = ranks

    def expert_plan(self) -> ExpertPlan:
        """How this module's own parameters are split where experts are spread over ranks."""
        return {}

    def spread(self, dispatch: Dispatch) -> None:
        """Told once, before any forward, how tokens reach the experts, of which this rank has some."""

    def after_step(self, total: Total) -> None:
        """Restores what must hold of this very module's parameters, DTensors maybe. No gradient is recorded."""

    def doubts(self) -> dict[str, str]:
        """{local name of a parameter: what it is, and ought not to be}, once a checkpoint has filled it. Collective."""
        return {}

    def metrics(self, total: Total) -> dict[str, Tensor]:
        """{local name: number} about the last step, to be logged. Asked for at logged steps, on all ranks alike."""
        return {}


class OnTokens(Module):
    """A module that works on each token, or each head, by itself: all of its own parameters are on every rank."""

    def tp_plan(self) -> Plan:
        return dict.fromkeys(self._parameters, SEQ)


@torch.no_grad()
def after_step(model: nn.Module, total: Total) -> None:
    """Runs every module's `after_step`: once the weights are initialised, and after each optimizer step."""
    for module in model.modules():
        if isinstance(module, Module):
            module.after_step(total)


@torch.no_grad()
def warn_of_doubts(model: nn.Module, folder: Path) -> None:
    """Logs every module's `doubts` about what was loaded from `folder`. Collective."""
    for path, module in model.named_modules():
        if isinstance(module, Module):
            for name, what in module.doubts().items():
                logger.warning("%s, loaded from %s, %s", f"{path}.{name}" if path else name, folder, what)


@torch.no_grad()
def collect_metrics(model: nn.Module, total: Total) -> dict[str, Tensor]:
    """{full name: number} of every module's `metrics`, summed over ranks by `total`."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Module):
            found |= {f"{path}.{name}" if path else name: value for name, value in module.metrics(total).items()}
    return found
