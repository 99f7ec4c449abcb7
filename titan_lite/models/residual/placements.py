"""Where the norms of a branch stand. The scale and the dropout of a branch act on what is added to the stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from titan_lite.models.context import Context
from titan_lite.models.norm import Norm
from titan_lite.models.residual.base import AdditiveResidual, Branch, Residual
from titan_lite.models.residual.branch_scale import BranchScale, NoScale

if TYPE_CHECKING:
    from titan_lite.job import Job


class PreNorm(AdditiveResidual):
    """x' = x + branch(norm(x)). Source: arXiv 2002.04745."""

    class Config(Residual.Config):
        type: Literal["pre"] = "pre"

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm = norm.build(dim=dim)

    def delta(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.scaled(branch(self.norm(x), context), context)


class OutNorm(AdditiveResidual):
    """x' = x + norm(branch(x)), as in OLMo 2. Source: arXiv 2501.00656, section 3.3.1."""

    class Config(Residual.Config):
        type: Literal["out_only"] = "out_only"

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm = norm.build(dim=dim)

    def delta(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.scaled(self.norm(branch(x, context)), context)


class PeriNorm(AdditiveResidual):
    """x' = x + norm_out(branch(norm_in(x))), as in Gemma 2; the paper also norms the embedding.

    Source: arXiv 2502.02732.
    """

    class Config(Residual.Config):
        type: Literal["peri"] = "peri"

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm_in = norm.build(dim=dim)
        self.norm_out = norm.build(dim=dim)

    def delta(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.scaled(self.norm_out(branch(self.norm_in(x), context)), context)


class Normless(AdditiveResidual):
    """x' = x + branch(x), which wants a scale that keeps the sum in bounds. Source: arXiv 2003.04887."""

    class Config(Residual.Config):
        type: Literal["none"] = "none"

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            if isinstance(self.scale, NoScale.Config):
                yield '.type = "none": nothing keeps deep sums in bounds; residual.scale.type = "rezero" does'

    def delta(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.scaled(branch(x, context), context)


class PostNorm(Residual):
    """x' = norm(x + branch(x)). Source: arXiv 1706.03762."""

    class Config(Residual.Config):
        type: Literal["post"] = "post"
        normalises_stream: ClassVar[bool] = True

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm = norm.build(dim=dim)

    def forward(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.norm(x + self.scaled(branch(x, context), context))


class SandwichSum(Residual):
    """x' = norm_sum(x + branch(norm_in(x))), the block of Huginn. Source: arXiv 2502.05171."""

    class Config(Residual.Config):
        type: Literal["sandwich_sum"] = "sandwich_sum"
        normalises_stream: ClassVar[bool] = True

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm_in = norm.build(dim=dim)
        self.norm_sum = norm.build(dim=dim)

    def forward(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.norm_sum(x + self.scaled(branch(self.norm_in(x), context), context))
