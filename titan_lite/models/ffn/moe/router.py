"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat, PositiveInt
from titan_lite.models.module import OnTokens
from titan_lite.models.spec import Spec


class Routing(NamedTuple):
    """The choice for N tokens, in float32."""

    experts: Tensor
    """(N, k) expert numbers."""
    weights: Tensor
    """(N, k) factors of their outputs."""
    scores: Tensor
    """(N, E), not negative."""
    logits: Tensor
    """(N, E)."""

    def probabilities(self) -> Tensor:
        """Scores (N, E) over their sum for each token: what balancing losses push."""
        return _normalized(self.scores)


class Router(OnTokens):
    """Tokens (N, D) -> Routing. Computed in float32: a rounded score can change which experts are chosen.

    A token goes to the top_k experts with the largest score plus offset; weights come from the scores alone.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "router"
        default_type: ClassVar[str | None] = "softmax"
        normalize: bool = True
        """Make the weights of a token's experts sum to 1, before `scale`."""
        scale: PositiveFloat = 1.0
        """Factor of all weights (DeepSeek-V3's routed_scaling_factor)."""
        bias: bool = False
        """Add a learned bias to the logits."""
        n_groups: PositiveInt = 1
        """Experts are split into this many groups, of which a token uses top_groups."""
        top_groups: PositiveInt = 1
        """Groups that a token may use: those with the largest sum of their two best scores."""

    def __init__(self, config: Config, dim: int, n_experts: int, top_k: int):
        super().__init__()
        self.dim, self.n_experts, self.top_k = dim, n_experts, top_k
        self.scale = config.scale
        self.weigh = _normalized if config.normalize else _as_they_are
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.bias = nn.Parameter(torch.empty(n_experts)) if config.bias else None
        limited = config.n_groups > 1
        self.groups = GroupLimit(config.n_groups, config.top_groups) if limited else NoGroupLimit()

    def logits(self, x: Tensor) -> Tensor:
        """(N, E) of tokens (N, D)."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores (N, E) of logits."""
        raise NotImplementedError

    def forward(self, x: Tensor, offset: Tensor | None, given: Tensor | None = None) -> Routing:
        """`offset` (E,) is added to the scores where experts are chosen; `given` (N, k) are those that are."""
        logits = self.logits(x)
        scores = self.scores(logits)
        selection = scores.detach() if offset is None else scores.detach() + offset
        experts = self.groups(selection).topk(self.top_k, dim=-1).indices if given is None else given
        weights = self.weigh(scores.gather(-1, experts))
        return Routing(experts, weights * self.scale, scores, logits)

    def param_specs(self) -> dict[str, Spec]:
        specs = {"weight": Spec("router", self.dim, self.n_experts)}
        return specs if self.bias is None else specs | {"bias": Spec("bias", 1, self.n_experts, 0.0)}


class NoGroupLimit(nn.Module):
    """All experts may be chosen."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores


class GroupLimit(nn.Module):
    """Scores (N, E) with those outside a token's best groups at -inf. Source: arXiv 2412.19437, section 2.1.2."""

    def __init__(self, n_groups: int, top_groups: int):
        super().__init__()
        self.n_groups, self.top_groups = n_groups, top_groups

    def forward(self, scores: Tensor) -> Tensor:
        grouped = scores.unflatten(-1, (self.n_groups, -1))  # (N, groups, E / groups)
        best = grouped.topk(2, dim=-1).values.sum(-1)  # (N, groups)
        chosen = best.topk(self.top_groups, dim=-1).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)


class SoftmaxRouter(Router):
    """p = softmax(x W^T); weights p of the k largest, over their sum: the same as a softmax over the k largest logits.

    Source: arXiv 2401.04088 (Mixtral).
    """

    class Config(Router.Config):
        type: Literal["softmax"] = "softmax"

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidRouter(Router):
    """s = sigmoid(x W^T); weights s of the k largest s + offset, over their sum. Source: arXiv 2412.19437."""

    class Config(Router.Config):
        type: Literal["sigmoid"] = "sigmoid"

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


def _normalized(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + 1e-20)


def _as_they_are(weights: Tensor) -> Tensor:
    return weights
