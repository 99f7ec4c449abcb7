"""Matrices. A slot, so that a variant (unit-norm rows) replaces every matrix of the model at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from titan_lite.config.component import Component, SlotConfig
from titan_lite.models.spec import Role, Spec, Start


class Linear(Component):
    """(..., d_in) -> (..., d_out). Built as `linear.build(d_in, d_out, role=, start=, bias=)`."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "linear"
        default_type: ClassVar[str | None] = "default"


class DefaultLinear(nn.Linear, Linear):
    """y = x W^T, plus a bias b where the module that builds it asks for one."""

    class Config(Linear.Config):
        type: Literal["default"] = "default"

    def __init__(
        self, config: Config, d_in: int, d_out: int, role: Role = "hidden", start: Start = "weight", bias: bool = False
    ):
        super().__init__(d_in, d_out, bias=bias)
        self.spec = Spec(role, d_in, d_out, start)

    def reset_parameters(self) -> None:
        """Nothing: the model's init slot fills every parameter."""

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": self.spec} | ({} if self.bias is None else {"bias": Spec("bias", 1, self.out_features, 0.0)})
