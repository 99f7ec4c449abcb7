"""Retrieval from a very large number of one-neuron experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveInt
from titan_lite.models.activation import Activation, activation
from titan_lite.models.context import Context
from titan_lite.models.ffn.base import FFN
from titan_lite.models.ffn.dispatch import HERE, Dispatch
from titan_lite.models.ffn.moe.tally import Tally
from titan_lite.models.ffn.query_norm import QueryNorm, RMSQueryNorm
from titan_lite.models.linear import Linear
from titan_lite.models.module import Total
from titan_lite.models.spec import Spec
from titan_lite.parallel.plan import EXPERT_DEGREE, SEQ, SPLIT_DEGREE, ExpertPlan, Plan, spread_problems

if TYPE_CHECKING:
    from titan_lite.job import Job


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even: a query is cut into two halves")
    return value


class PEER(FFN):
    """sum over heads and their top_k of N = n_keys^2 experts of g_i act(<u_i, x>) v_i, g = softmax of the k scores.

    Expert a n_keys + b scores q_1 . c_a + q_2 . c'_b, the query's halves against two tables of n_keys sub-keys: the k
    best of all N lie among the k x k sums of each half's k best. The rows u of all chosen experts exist at once, a
    tensor (B, T, H, k, D) that is kept for backward; those of v do not. Source: arXiv 2407.04153.
    """

    class Config(FFN.Config):
        type: Literal["peer"] = "peer"
        has_experts: ClassVar[bool] = True
        n_keys: PositiveInt = 128
        """Sub-keys per half; there are n_keys^2 experts."""
        n_heads: PositiveInt = 8
        """Heads, which retrieve from the same experts."""
        top_k: PositiveInt = 16
        """Experts per head and token."""
        query_dim: Annotated[PositiveInt, AfterValidator(_even)] = 256
        """Width of a head's query, an even number."""
        query_norm: QueryNorm.Config = RMSQueryNorm.Config()
        """Normalisation of queries."""
        keys: Literal["shared", "per_head"] = "shared"
        """Whether all heads use the same sub-keys."""
        activation: Activation = "gelu"
        """Of each expert's neuron."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from spread_problems(job, ".n_keys", self.n_keys, self.n_keys**2)
            if (parts := job.parallelism.expert_tensor_parallel_degree) > 1:
                why = 'splits each expert over ranks, and those of model.ffn.type = "peer" are of one neuron'
                yield Problem(CROSS_FIELD, SPLIT_DEGREE, why, parts, f"1, with any {EXPERT_DEGREE}")
            if self.top_k > self.n_keys**2:
                why = f"is more than there are experts with n_keys = {self.n_keys}"
                yield Problem(CROSS_FIELD, ".top_k", why, self.top_k, f"1 to {self.n_keys**2}")

    weighs_tokens: ClassVar[bool] = True

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.dim, self.n_keys, self.n_heads, self.top_k = dim, config.n_keys, config.n_heads, config.top_k
        self.half_dim = config.query_dim // 2
        self.query = linear.build(dim, config.n_heads * config.query_dim)
        self.query_norm = config.query_norm.build(n_heads=config.n_heads, query_dim=config.query_dim)
        tables = 1 if config.keys == "shared" else config.n_heads
        self.keys = nn.Parameter(torch.empty(2, tables, config.n_keys, self.half_dim))
        self.u = nn.Parameter(torch.empty(config.n_keys**2, dim))
        self.v = nn.Parameter(torch.empty(config.n_keys**2, dim))
        self.activation = activation(config.activation)
        self.tally = Tally(config.n_keys**2)
        self.dispatch = HERE

    def expert_plan(self) -> ExpertPlan:
        return {"u": None, "v": None}

    def spread(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch

    def tp_plan(self) -> Plan:
        return dict.fromkeys(("query", "keys", "u", "v"), SEQ)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        experts, scores = self.retrieve(x, context)  # (B, T, H, k)
        if context.token_weight is not None:
            self.tally.add(experts)
        chosen, g = experts.flatten(2).flatten(0, 1), scores.softmax(-1).flatten(2).flatten(0, 1)  # (B T, H k)
        answer = self.of_all_experts if self.dispatch.size == 1 else self.of_own_experts
        return answer(x.flatten(0, 1), chosen, g.to(x.dtype)).view_as(x)

    def of_all_experts(self, x: Tensor, experts: Tensor, g: Tensor) -> Tensor:
        """The weighted sum (N, D) of the experts (N, j) of tokens x (N, D), with factors g (N, j)."""
        hidden = torch.einsum("nd,njd->nj", x, F.embedding(experts, self.u))
        # Adds weighted rows of v without a tensor of all of them.
        return F.embedding_bag(experts, self.v, mode="sum", per_sample_weights=g * self.activation(hidden))

    def of_own_experts(self, x: Tensor, experts: Tensor, g: Tensor) -> Tensor:
        """The same, each rank adding what the experts that it has make of the tokens of all ranks.

        A token has so many experts that nearly every rank has some of them: all tokens go everywhere.
        """
        ranks, n_own = self.dispatch, len(self.u)
        x, experts, g = ranks.gather(x), ranks.gather(experts), ranks.gather(g)
        own = experts - ranks.rank * n_own
        is_here = (own >= 0) & (own < n_own)
        counts = is_here.sum(1)
        n_pairs = ranks.read(counts.sum(), experts.numel() // ranks.size)
        token, column = is_here.nonzero_static(size=n_pairs).unbind(1)
        own, g = own[token, column], g[token, column]
        hidden = (x[token] * F.embedding(own, self.u)).sum(-1)
        starts = counts.cumsum(0) - counts
        y = F.embedding_bag(own, self.v, starts, mode="sum", per_sample_weights=g * self.activation(hidden))
        return ranks.reduce(y)

    def retrieve(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The top_k experts of every head and their scores in float32, both (B, T, H, k)."""
        q = self.query_norm(self.query(x).unflatten(-1, (self.n_heads, -1)), context).float()
        halves = q.unflatten(-1, (2, self.half_dim))  # (B, T, H, 2, Dk / 2)
        keys = self.keys.float().expand(2, self.n_heads, -1, -1)
        scores = torch.einsum("bthsd,shnd->bthsn", halves, keys)
        best, numbers = scores.topk(min(self.top_k, self.n_keys), dim=-1)  # (B, T, H, 2, k)
        sums = best[..., 0, :, None] + best[..., 1, None, :]  # (B, T, H, k, k)
        experts = numbers[..., 0, :, None] * self.n_keys + numbers[..., 1, None, :]
        top, place = sums.flatten(-2).topk(self.top_k, dim=-1)
        return experts.flatten(-2).gather(-1, place), top

    def after_step(self, total: Total) -> None:
        self.tally.close()

    def metrics(self, total: Total) -> dict[str, Tensor]:
        """`used_experts`: fraction of the experts that the step's tokens chose; `usage_kl`: KL divergence of their
        choices from uniform ones, in nats."""
        assert self.tally.last is not None, "metrics are of a step that has ended"
        count = total(self.tally.last)
        share = count / count.sum()
        return {"used_experts": (count > 0).float().mean(), "usage_kl": torch.xlogy(share, share * len(share)).sum()}

    def param_specs(self) -> dict[str, Spec]:
        chosen = self.n_heads * self.top_k
        used = chosen / self.n_keys**2
        return {
            "keys": Spec("router", self.half_dim, self.n_keys, used=self.n_heads / self.keys.shape[1]),
            "u": Spec("expert", self.dim, 1, used=used),
            "v": Spec("expert", chosen, self.dim, "residual", used=used),
        }
