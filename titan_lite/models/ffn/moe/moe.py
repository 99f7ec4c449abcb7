"""Sparse mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Count, PositiveInt
from titan_lite.models.aux_loss import add_loss
from titan_lite.models.context import Context
from titan_lite.models.ffn.base import FFN
from titan_lite.models.ffn.dispatch import HERE, Dispatch, inverse
from titan_lite.models.ffn.glu import GLU
from titan_lite.models.ffn.moe.balance import Balance
from titan_lite.models.ffn.moe.experts import Experts, GLUExperts
from titan_lite.models.ffn.moe.offset import NoOffset, Offset
from titan_lite.models.ffn.moe.router import Router, Routing, SoftmaxRouter
from titan_lite.models.ffn.moe.tally import Tally
from titan_lite.models.linear import Linear
from titan_lite.models.module import Total
from titan_lite.models.row import Row
from titan_lite.parallel.plan import split_problems, spread_problems

if TYPE_CHECKING:
    from titan_lite.job import Job


class MoE(FFN):
    """sum over a token's top_k experts of weight_i * expert_i(x), plus what shared experts make of every token.

    No token is dropped, whatever the load. Source: arXiv 1701.06538, arXiv 2401.06066 (shared experts).
    """

    class Config(FFN.Config):
        type: Literal["moe"] = "moe"
        has_experts: ClassVar[bool] = True
        n_experts: PositiveInt = 8
        """Routed experts E."""
        top_k: PositiveInt = 2
        """Experts per token."""
        experts: Experts.Config = GLUExperts.Config()
        """What each expert is."""
        router: Router.Config = SoftmaxRouter.Config()
        """How tokens choose."""
        offset: Offset.Config = NoOffset.Config()
        """Offsets on the scores by which experts are chosen."""
        balance: Annotated[tuple[Balance.Config, ...], Field(strict=False)] = ()
        """Losses on the routing, added to the objective."""
        shared_hidden: Count = 0
        """Inner width of the shared experts together, a gated network (SiLU) for every token; 0 = none."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from split_problems(job, ".shared_hidden", self.shared_hidden)
            yield from spread_problems(job, ".n_experts", self.n_experts, self.n_experts)
            if self.top_k > self.n_experts:
                why = f"is more than n_experts = {self.n_experts}"
                yield Problem(CROSS_FIELD, ".top_k", why, self.top_k, f"1 to {self.n_experts}")
            else:
                yield from self._problems_of_groups()

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            choices = job.training.seq_len * self.top_k
            if job.debug.moe_force_load_balance and choices % self.n_experts:
                what = "with debug.moe_force_load_balance some experts get a token more of each row than others"
                yield f".n_experts = {self.n_experts} does not divide the {choices} choices of a row: {what}"

        def _problems_of_groups(self) -> Iterable[Problem]:
            groups, top = self.router.n_groups, self.router.top_groups
            E, k = self.n_experts, self.top_k
            if groups > 1 and (E % groups or E // groups < 2):
                why = f"does not split n_experts = {E} into equal groups of at least 2"
                legal = ", ".join(str(g) for g in range(1, E // 2 + 1) if E % g == 0)
                yield Problem(CROSS_FIELD, ".router.n_groups", why, groups, legal)
            elif top > groups:
                why = f"is more than router.n_groups = {groups}"
                yield Problem(CROSS_FIELD, ".router.top_groups", why, top, f"1 to {groups}")
            elif top * (E // groups) < k:
                why = f"of {groups} groups of {E // groups} experts do not hold top_k = {k}"
                yield Problem(CROSS_FIELD, ".router.top_groups", why, top, f"{-(-k * groups // E)} to {groups}")

    weighs_tokens: ClassVar[bool] = True
    evenly: bool = False
    """For timing: tokens go to experts in turn and not to those with the best scores, which still weigh them."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        sizes = {"dim": dim, "n_experts": config.n_experts, "top_k": config.top_k}
        self.router: Router = config.router.build(**sizes)
        self.experts: Experts = config.experts.build(**sizes)
        self.offset: Offset = config.offset.build(n_experts=config.n_experts)
        self.balance = nn.ModuleList(balance.build() for balance in config.balance)
        self.shared = SharedExperts(dim, config.shared_hidden, linear) if config.shared_hidden else NoSharedExperts()
        self.tally = Tally(config.n_experts)
        self.dispatch = HERE

    def spread(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = x.flatten(0, 1)  # (N, D)
        given = self.in_turn(context.own_positions).repeat(len(x), 1) if self.evenly else None
        routing = self.router(tokens, self.offset(), given)
        if context.token_weight is not None:
            self.tally.add(routing.experts)
            tokens = self.balanced(tokens, routing, len(x), context.token_weight, context.row)
        return self.shared(self.routed(tokens, routing).view_as(x), x, context)

    def in_turn(self, positions: Tensor) -> Tensor:
        """Experts (T, k) of tokens at these positions, whatever the layout: k after k, so that all get equally many."""
        k, E = self.router.top_k, self.router.n_experts
        return (positions[:, None] * k + torch.arange(k, device=positions.device)) % E

    def balanced(self, tokens: Tensor, routing: Routing, n_rows: int, token_weight: Tensor, row: Row) -> Tensor:
        """The tokens, carrying the balancing losses."""
        for balance in self.balance:
            tokens = add_loss(tokens, cast(Balance, balance).loss(routing, n_rows, row) * token_weight)
        return tokens

    def after_step(self, total: Total) -> None:
        self.offset.move(self.tally.close(), total)

    def metrics(self, total: Total) -> dict[str, Tensor]:
        """`max_load`: the busiest expert's share of the choices times E; 1 is perfect balance, E / k the worst."""
        assert self.tally.last is not None, "metrics are of a step that has ended"
        load = total(self.tally.last)
        return {"max_load": load.max() / load.mean()}

    def routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """What the chosen experts make of tokens (N, D): weighted outputs, added for each token."""
        sharers = self.dispatch.sharers
        parts = (tokens, routing.experts, routing.weights)
        tokens, experts, weights = (sharers.gather(part[None], self.training)[0] for part in parts)
        N, k = experts.shape
        expert, order = experts.flatten().sort(stable=True)  # (N k)
        numbers = torch.arange(routing.logits.shape[-1], device=tokens.device)
        # Nothing here reads a number back from the device: how many tokens each expert has stays there.
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        y = self.dispatch.run(self.experts, tokens[order // k], ends)  # (N k, D), sorted by expert
        y = y[inverse(order)].view(N, k, -1)
        y = (y * weights[..., None].to(y.dtype)).sum(1)
        return sharers.reduce(y[None], self.training)[0]


def route_evenly(model: nn.Module) -> None:
    """Makes all routers of a model send each expert equally many tokens."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.evenly = True


class SharedExperts(nn.Module):
    """Adds to the routed experts' y what a gated network makes of every token x."""

    def __init__(self, dim: int, hidden: int, linear: Linear.Config):
        super().__init__()
        self.ffn = GLU.Config(hidden=hidden).build(dim=dim, linear=linear)

    def forward(self, y: Tensor, x: Tensor, context: Context) -> Tensor:
        return y + self.ffn(x, context)


class NoSharedExperts(nn.Module):
    """The routed experts alone."""

    def forward(self, y: Tensor, x: Tensor, context: Context) -> Tensor:
        return y
