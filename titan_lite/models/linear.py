"""Matrices. A slot, so that a variant (unit-norm rows) replaces every matrix of the model at once."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module, Total
from titan_lite.models.spec import Role, Spec, Start

ROUNDED: Final = 1e-2
"""How far from 1 a length may be that was 1 before it was rounded to bfloat16."""


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

    @property
    def along(self) -> int:
        """The dim of the weight along which the vectors of model width lie."""
        return 0 if self.spec.start == "residual" else 1

    def after_step(self, total: Total) -> None:
        to_unit_length(self.weight, self.along)

    def doubts(self) -> dict[str, str]:
        return length_doubts("weight", self.weight, self.along)


def to_unit_length(weight: Tensor, dim: int) -> None:
    """Divides the vectors along `dim` of a matrix by their lengths, in place; exact for a DTensor in any layout.

    Lengths are computed in float32. A vector of zeros stays one.
    """
    local, length = _local(weight), _lengths(weight, dim)
    local.div_(length.clamp(min=1e-12))


def length_doubts(name: str, weight: Tensor, dim: int) -> dict[str, str]:
    """`Module.doubts` of a matrix whose vectors along `dim` should have length 1. Collective for a DTensor."""
    from torch.distributed.tensor import DTensor

    least, most = _lengths(weight, dim).aminmax()
    if isinstance(weight, DTensor):
        for axis in range(weight.device_mesh.ndim):
            group = weight.device_mesh.get_group(axis)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group)
    if abs(least.item() - 1) <= ROUNDED and abs(most.item() - 1) <= ROUNDED:
        return {}
    said = f"has vectors of length {least.item():.3g} to {most.item():.3g}"
    return {name: f"{said}: each should be 1, and a training step makes it so"}


def _lengths(weight: Tensor, dim: int) -> Tensor:
    """Lengths of this rank's vectors, in float32."""
    from torch.distributed.tensor import DTensor

    length = torch.linalg.vector_norm(_local(weight), dim=dim, keepdim=True, dtype=torch.float32)
    if isinstance(weight, DTensor):
        for axis, place in enumerate(weight.placements):
            # Where an axis of the mesh cuts the vectors, their squares are added up. (FSDP's shard of a shard is no
            # `Shard`, but has a `dim` too.)
            if getattr(place, "dim", None) == dim:
                length = length.square_()
                torch.distributed.all_reduce(length, group=weight.device_mesh.get_group(axis))
                length = length.sqrt_()
    return length


def _local(weight: Tensor) -> Tensor:
    # Half a second to import, and checking a config reads this file too.
    from torch.distributed.tensor import DTensor

    return weight.to_local() if isinstance(weight, DTensor) else weight
