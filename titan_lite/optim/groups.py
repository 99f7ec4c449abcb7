"""Parameter groups by role."""

from __future__ import annotations

from typing import Any

from torch import nn

from titan_lite.models.spec import Spec

DECAYED_ROLES = ("embed", "hidden", "head", "expert", "router")


def parameter_groups(model: nn.Module, specs: dict[str, Spec], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, of the parameters that are trained; gains and scalars do not decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (decayed if specs[name].role in DECAYED_ROLES else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
