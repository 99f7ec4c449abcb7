"""Grouped-query attention with one matrix for queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.models.attention.gqa import GroupedAttention, cut
from titan_lite.models.linear import Linear
from titan_lite.parallel.plan import DEGREE, Plan, degree, divisors, heads

if TYPE_CHECKING:
    from titan_lite.job import Job

PROJECTIONS = {"q", "k", "v"}


class FusedGQA(GroupedAttention):
    """Grouped-query attention with one matrix for queries, keys and values.

    Its rows go by key/value head: the H/G query heads that read it, its key, its value; so any split of the rows
    between key/value heads leaves whole groups. With G = H that is GPT-NeoX's order. Source:
    arXiv 2204.06745.
    """

    class Config(GroupedAttention.Config):
        type: Literal["gqa_fused"] = "gqa_fused"

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            if 0 < len(PROJECTIONS & set(self.bias)) < len(PROJECTIONS):
                why = "queries, keys and values come from one matrix, with one bias (attention.type = gqa_fused)"
                yield Problem(CROSS_FIELD, ".bias", why, list(self.bias), 'all of "q", "k", "v" or none of them')

        def head_split_problems(self, job: Job) -> Iterable[Problem]:
            groups = self.n_kv_heads or self.n_heads
            if groups % degree(job):
                why = (
                    f'{DEGREE} = {degree(job)} does not divide it, and the matrix of attention.type = "gqa_fused" can '
                )
                why += "only be cut between key/value heads"
                allowed = f'{DEGREE} = {divisors(groups)}, or attention.type = "gqa"'
                yield Problem(CROSS_FIELD, ".n_kv_heads", why, groups, allowed)

    def project_with(self, config: GroupedAttention.Config, dim: int, linear: Linear.Config) -> None:
        self.group = (self.n_heads // self.n_kv_heads * self.head_dim, self.head_dim, self.value_dim)
        self.qkv = linear.build(dim, self.n_kv_heads * sum(self.group), bias=set(config.bias) >= PROJECTIONS)

    def tp_plan(self) -> Plan:
        return {**super().tp_plan(), "qkv": heads(self.n_kv_heads)}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, sum(self.group))).split(self.group, dim=-1)  # (B, T, G, ...)
        return cut(q.flatten(2), self.head_dim), k.transpose(1, 2), v.transpose(1, 2)
