"""Normalisation of the queries with which PEER looks up experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveFloat, Probability
from titan_lite.models.context import Context
from titan_lite.models.module import OnTokens, Total
from titan_lite.models.spec import Spec
from titan_lite.parallel.deal import CONTEXT, sharers
from titan_lite.parallel.plan import DEGREE, degree

if TYPE_CHECKING:
    from titan_lite.job import Job


class QueryNorm(OnTokens):
    """(..., H, Dk) -> (..., H, Dk)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "query_norm"
        default_type: ClassVar[str | None] = "rms"


class NoQueryNorm(QueryNorm):
    """Queries as projected."""

    class Config(QueryNorm.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_heads: int, query_dim: int):
        super().__init__()

    def forward(self, q: Tensor, context: Context) -> Tensor:
        return q


class RMSQueryNorm(QueryNorm):
    """q / rms(q) with a gain (Dk), each token by itself: the same for every layout. Source: arXiv 1910.07467."""

    class Config(QueryNorm.Config):
        type: Literal["rms"] = "rms"
        eps: PositiveFloat = 1e-5
        """Added to the mean square, inside the root."""

    def __init__(self, config: Config, n_heads: int, query_dim: int):
        super().__init__()
        self.query_dim, self.eps = query_dim, config.eps
        self.weight = nn.Parameter(torch.empty(query_dim))

    def forward(self, q: Tensor, context: Context) -> Tensor:
        return F.rms_norm(q, (self.query_dim,), self.weight, self.eps)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("norm", 1, self.query_dim, 1.0)}


class BatchQueryNorm(QueryNorm):
    """Batch normalisation of each query feature, over the tokens of a micro-batch; else by running statistics.

    The running statistics follow those of the global batch, once a step. In training a token's query depends on the
    other tokens of its micro-batch, later ones too. Source: arXiv 2407.04153, section 3.3.
    """

    class Config(QueryNorm.Config):
        type: Literal["batch"] = "batch"
        eps: PositiveFloat = 1e-5
        """Added to the variance, inside the root."""
        decay: Probability = 0.9
        """What a step leaves of the running statistics."""

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            yield '.type = "batch" depends on training.local_batch_size: other layouts train a little differently'

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            for key, n in ((DEGREE, degree(job)), (CONTEXT, sharers(job))):
                if n > 1:
                    why = f"normalises over the tokens of a rank, and {key} = {n} gives each rank other ones of the "
                    why += "same rows"
                    yield Problem(CROSS_FIELD, ".type", why, self.type, f'"rms" or "none", or {key} = 1')

    weighs_tokens: ClassVar[bool] = True
    mean: Tensor
    variance: Tensor
    sums: Tensor
    """(3, H Dk) of the step so far, on this rank: how many tokens, their sum, the sum of their squares."""

    def __init__(self, config: Config, n_heads: int, query_dim: int):
        super().__init__()
        self.features, self.eps, self.decay = n_heads * query_dim, config.eps, config.decay
        self.weight = nn.Parameter(torch.empty(self.features))
        self.bias = nn.Parameter(torch.empty(self.features))
        self.register_buffer("mean", torch.empty(self.features, dtype=torch.float32))
        self.register_buffer("variance", torch.empty(self.features, dtype=torch.float32))
        self.register_buffer("sums", torch.empty(3, self.features, dtype=torch.float32))

    def forward(self, q: Tensor, context: Context) -> Tensor:
        flat = q.flatten(-2).flatten(0, -2).float()  # (N, H Dk)
        weight, bias = self.weight.float(), self.bias.float()
        if context.token_weight is None:
            y = F.batch_norm(flat, self.mean, self.variance, weight, bias, eps=self.eps)
        else:
            # A recomputed forward adds its tokens again; sums over counts, which the step ends with, stay the same.
            tokens = flat.detach()
            self.sums.add_(
                torch.stack((torch.ones_like(tokens[0]) * len(tokens), tokens.sum(0), tokens.square().sum(0)))
            )
            y = F.batch_norm(flat, None, None, weight, bias, training=True, eps=self.eps)
        return y.view(q.shape).to(q.dtype)

    def after_step(self, total: Total) -> None:
        n, summed, squares = total(self.sums)
        keep = 1 - (1 - self.decay) * (n > 0).float()  # before the first step there is nothing to follow
        mean = summed / n.clamp(min=1)
        variance = (squares / n.clamp(min=1) - mean.square()).clamp(min=0)
        self.mean.mul_(keep).add_((1 - keep) * mean)
        self.variance.mul_(keep).add_((1 - keep) * variance)
        self.sums.zero_()

    def param_specs(self) -> dict[str, Spec]:
        starts = {"mean": 0.0, "variance": 1.0, "sums": 0.0}
        return {
            "weight": Spec("norm", 1, self.features, 1.0),
            "bias": Spec("bias", 1, self.features, 0.0),
            **{name: Spec("scalar", 1, self.features, start) for name, start in starts.items()},
        }
