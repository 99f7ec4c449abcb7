"""Factors of a branch before it joins the residual stream."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.module import OnTokens
from titan_lite.models.spec import Spec


class BranchScale(OnTokens):
    """(B, T, D) -> (B, T, D). Built as `build(dim=, n_layers=)`, `n_layers` counting the executed ones."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "branch_scale"
        default_type: ClassVar[str | None] = "none"

        def pair(self, dim: int, n_layers: int) -> tuple[BranchScale, BranchScale]:
            """Those of the attention and the feed-forward branch of one layer."""
            return self.build(dim=dim, n_layers=n_layers), self.build(dim=dim, n_layers=n_layers)


class NoScale(BranchScale):
    """y = x."""

    class Config(BranchScale.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class ReZero(BranchScale):
    """y = a * x with a learned scalar a that starts at 0: every layer begins as the identity. Source: arXiv 2003.04887.

    The paper has one a per layer, for both branches.
    """

    class Config(BranchScale.Config):
        type: Literal["rezero"] = "rezero"
        per: Literal["sublayer", "layer"] = "sublayer"
        """Whether the two branches of a layer have an a each, or one together."""
        init: Annotated[float, Field(allow_inf_nan=False)] = 0.0
        """First value of a."""
        lr_multiplier: PositiveFloat = 1.0
        """a = lr_multiplier * parameter: Adam, whose steps do not depend on the gradient's size, moves a this much
        faster than other parameters."""

        def build(self, *args: Any, **sizes: Any) -> ReZero:
            return (ReZero if self.lr_multiplier == 1 else PacedReZero)(self, *args, **sizes)

        def pair(self, dim: int, n_layers: int) -> tuple[BranchScale, BranchScale]:
            if self.per == "sublayer":
                return super().pair(dim, n_layers)
            owner = self.build(dim=dim, n_layers=n_layers)
            return owner, SameScale(owner)

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__()
        self.start = config.init / config.lr_multiplier
        self.alpha = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha

    def param_specs(self) -> dict[str, Spec]:
        return {"alpha": Spec("scalar", 1, 1, self.start)}


class PacedReZero(ReZero):
    """ReZero with a learning rate of its own."""

    def __init__(self, config: ReZero.Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.multiplier = config.lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.multiplier * self.alpha)


class SameScale(BranchScale):
    """What the scale of the layer's other branch does, whose parameters stay that one's."""

    def __init__(self, owner: BranchScale):
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that its parameters are not registered here too

    def forward(self, x: Tensor) -> Tensor:
        return self._owner[0](x)


class LayerScale(BranchScale):
    """y = g * x with a learned g per channel that starts small. Source: arXiv 2103.17239."""

    class Config(BranchScale.Config):
        type: Literal["layerscale"] = "layerscale"
        init: PositiveFloat = 1e-5
        """First value of g; the paper takes 0.1 up to 18 layers, 1e-5 at 24, 1e-6 beyond."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__()
        self.dim, self.start = dim, config.init
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("scalar", 1, self.dim, self.start)}


class ConstantScale(BranchScale):
    """y = c * x. Source: arXiv 2310.02244 (1 / sqrt(L)), arXiv 2505.01618 (1 / L), Granite's residual_multiplier."""

    class Config(BranchScale.Config):
        type: Literal["constant"] = "constant"
        value: Literal["inverse_sqrt_depth", "inverse_depth"] | PositiveFloat
        """c: a number, 1 / sqrt(n_layers) or 1 / n_layers."""

        def factor(self, n_layers: int) -> float:
            """c in a model of so many executed layers."""
            if isinstance(self.value, str):
                return {"inverse_sqrt_depth": n_layers**-0.5, "inverse_depth": 1 / n_layers}[self.value]
            return self.value

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__()
        self.value = config.factor(n_layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value
