"""The residual slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Probability
from titan_lite.models.context import Context
from titan_lite.models.dropout import dropout
from titan_lite.models.module import Module
from titan_lite.models.norm import Norm
from titan_lite.models.residual.branch_scale import BranchScale, NoScale, ReZero

if TYPE_CHECKING:
    from titan_lite.job import Job

Branch = Callable[[Tensor, Context], Tensor]


class Residual(Module):
    """(x, branch, context) -> x', all (B, T, D). One stands around each branch of a layer, or around both together."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "residual"
        default_type: ClassVar[str | None] = "pre"
        normalises_stream: ClassVar[bool] = False
        """Whether x' is normalised already, so that the model needs no final norm."""
        scale: BranchScale.Config = NoScale.Config()
        """Factor of the branch before it is added."""
        dropout: Probability = 0.0
        """Probability with which an element of the branch is dropped."""

        def pair(self, dim: int, norm: Norm.Config, n_layers: int) -> tuple[Residual, Residual]:
            """Those around the attention and the feed-forward branch of one layer, of `n_layers` executed ones."""
            scales = self.scale.pair(dim=dim, n_layers=n_layers)
            places = ("attention", "ffn")
            first, second = (
                self.build(dim=dim, norm=norm, n_layers=n_layers, scale=scale, place=place)
                for scale, place in zip(scales, places, strict=True)
            )
            return first, second

        def single(self, dim: int, norm: Norm.Config, n_layers: int) -> Residual:
            """The one around both branches of a layer together."""
            scale = self.scale.build(dim=dim, n_layers=n_layers)
            residual: Residual = self.build(dim=dim, norm=norm, n_layers=n_layers, scale=scale, place="layer")
            return residual

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if self.normalises_stream and isinstance(self.scale, ReZero.Config):
                name: Any = self.model_dump()["type"]
                yield Problem(
                    code=CROSS_FIELD,
                    key=".scale.type",
                    value="rezero",
                    why=f'wants a sum that is left as it is, and residual.type = "{name}" normalises it',
                    allowed='residual.type "none", "pre", "peri" or "out_only", or another scale',
                )

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__()
        self.scale = scale
        self.dropout = dropout(config.dropout, place)

    def scaled(self, y: Tensor, context: Context) -> Tensor:
        """A branch's output as it is added."""
        return self.scale(self.dropout(y, context.noise))


class AdditiveResidual(Residual):
    """x' = x + delta(x): placements in which nothing happens to the sum, so that branches can stand side by side."""

    def delta(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        """What the branch adds to the stream."""
        raise NotImplementedError

    def forward(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return x + self.delta(x, branch, context)
