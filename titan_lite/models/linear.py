"""Matrices. A slot, so that a variant (unit-norm rows) replaces every matrix of the model at once."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module, Total
from titan_lite.models.spec import Role, Spec, Start


class Linear(Module):
    """(..., d_in) -> (..., d_out). Built as `linear.build(d_in, d_out, role=, start=, bias=)`."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "linear"
        default_type: ClassVar[str | None] = "default"


class DefaultLinear(nn.Linear, Linear):
    """y = x W^T, plus a bias b where the module that builds it asks for one. Source: torch.nn.Linear."""

    class Config(Linear.Config):
        type: Literal["default"] = "default"

    def __init__(
        self,
        config: Linear.Config,
        d_in: int,
        d_out: int,
        role: Role = "hidden",
        start: Start = "weight",
        bias: bool = False,
    ):
        super().__init__(d_in, d_out, bias=bias)
        self.spec = Spec(role, d_in, d_out, start)

    def reset_parameters(self) -> None:
        """Nothing: the model's init slot fills every parameter."""

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": self.spec} | ({} if self.bias is None else {"bias": Spec("bias", 1, self.out_features, 0.0)})


class UnitLinear(DefaultLinear):
    """y = x W^T in which every vector of model width in W has length 1, restored after each optimizer step.

    Those are the rows of a matrix that reads the residual stream, and the columns of one that writes into it.
    Source: arXiv 2410.01131, section 2.6 (nGPT).
    """

    class Config(Linear.Config):
        type: Literal["unit"] = "unit"

    def after_step(self, total: Total) -> None:
        to_unit_length(self.weight, dim=0 if self.spec.start == "residual" else 1)


def to_unit_length(weight: Tensor, dim: int) -> None:
    """Divides the vectors along `dim` of a matrix by their lengths, in place; exact for a DTensor in any layout.

    Lengths are computed in float32. A vector of zeros stays one.
    """
    # Half a second to import, and checking a config reads this file too.
    from torch.distributed.tensor import DTensor

    local = weight.to_local() if isinstance(weight, DTensor) else weight
    length = torch.linalg.vector_norm(local, dim=dim, keepdim=True, dtype=torch.float32)
    if isinstance(weight, DTensor):
        for axis, place in enumerate(weight.placements):
            # Where an axis of the mesh cuts the vectors, their squares are added up. (FSDP's shard of a shard is no
            # `Shard`, but has a `dim` too.)
            if getattr(place, "dim", None) == dim:
                length = length.square_()
                torch.distributed.all_reduce(length, group=weight.device_mesh.get_group(axis))
                length = length.sqrt_()
    local.div_(length.clamp(min=1e-12))
