"""Grouped-query attention, with multi-head and multi-query attention as its ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Count
from titan_lite.models.activation import Activation, activation
from titan_lite.models.attention.heads import HeadAttention, Kept, undivided
from titan_lite.models.attention.qk_norm import NoQKNorm, QKNorm
from titan_lite.models.attention.value import NoValueMix, ValueMix
from titan_lite.models.context import Context, n_positions
from titan_lite.models.linear import Linear
from titan_lite.parallel.plan import DEGREE, GATHER, ROW, Plan, degree, heads, kv_heads

if TYPE_CHECKING:
    from titan_lite.job import Job

Projection = Literal["q", "k", "v", "o"]


class GroupedAttention(HeadAttention):
    """H query heads share G key/value heads: head h reads key/value head floor(h G / H). Source: arXiv 2305.13245.

    A subclass says which matrices make queries, keys and values.
    """

    class Config(HeadAttention.Config):
        n_kv_heads: Count = 0
        """Key/value heads G, a divisor of n_heads; 0 = n_heads (multi-head attention), 1 = multi-query attention."""
        head_dim: Count = 0
        """Width of a query and key head Dh; 0 = dim / n_heads."""
        value_dim: Count = 0
        """Width of a value head Dv; 0 = head_dim."""
        bias: Annotated[tuple[Projection, ...], Field(strict=False)] = ()
        """Projections with a bias."""
        activation: Activation = "identity"
        """Applied to projected queries, keys and values (MegaTransformer's heads_activation)."""
        qk_norm: QKNorm.Config = NoQKNorm.Config()
        """Normalisation of queries and keys."""
        value_mix: ValueMix.Config = NoValueMix.Config()
        """What is mixed into the values."""

        def width(self, dim: int) -> int:
            return self.head_dim or dim // self.n_heads

        def value_width(self, dim: int) -> int:
            return self.value_dim or self.width(dim)

        def value_shape(self, dim: int) -> tuple[int, int]:
            """G and Dv of a model of this width."""
            return self.groups(), self.value_width(dim)

        def groups(self) -> int:
            return self.n_kv_heads or self.n_heads

        def leaves(self, dim: int) -> dict[str, tuple[int, int]]:
            return dict.fromkeys(self.value_mix.leaves, self.value_shape(dim))

        def kept(self, dim: int) -> Kept:
            n_kv_heads, value_dim = self.value_shape(dim)
            return Kept((n_kv_heads, self.width(dim)), (n_kv_heads, value_dim))

        def kept_heads(self, dim: int) -> str:
            n_kv_heads, _ = self.value_shape(dim)
            return f"model.attention.n_kv_heads = {n_kv_heads}"

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            if self.n_kv_heads and self.n_heads % self.n_kv_heads:
                divisors = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
                yield Problem(
                    code=CROSS_FIELD,
                    key=".n_kv_heads",
                    value=self.n_kv_heads,
                    why=f"must divide n_heads ({self.n_heads})",
                    allowed=", ".join(map(str, divisors)),
                )
            if not self.head_dim and job.model.dim % self.n_heads:
                yield undivided(self.n_heads, job.model.dim)
            else:
                yield from self.position.head_problems(self.width(job.model.dim))
            yield from self.head_split_problems(job)

        def head_split_problems(self, job: Job) -> Iterable[Problem]:
            """What is wrong with sharing out heads to tensor-parallel ranks."""
            n, groups = degree(job), self.n_kv_heads or self.n_heads
            if self.n_heads % n == 0 and groups % n and n % groups:
                why = (
                    f"cannot be shared out: {DEGREE} = {n} is neither a divisor nor a multiple, and ranks with equally "
                )
                why += "many query heads would need different numbers of key/value heads"
                fit = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0 and (g % n == 0 or n % g == 0)]
                yield Problem(CROSS_FIELD, ".n_kv_heads", why, groups, ", ".join(map(str, fit)))

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.dim, self.n_heads, self.head_dim = dim, config.n_heads, config.width(dim)
        self.n_kv_heads, self.value_dim = config.value_shape(dim)
        self.project_with(config, dim, linear)
        self.activation = activation(config.activation)
        self.o = linear.build(self.n_heads * self.value_dim, dim, start="residual", bias="o" in config.bias)
        sizes = {"n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads, "head_dim": self.head_dim}
        self.qk_norm = config.qk_norm.build(dim=dim, **sizes)
        self.value_mix = config.value_mix.build()
        self.attend_with(config, dim, linear, turned=self.head_dim, kept=config.kept(dim))

    def project_with(self, config: Config, dim: int, linear: Linear.Config) -> None:
        """Makes the matrices that `project` uses."""
        raise NotImplementedError

    def tp_plan(self) -> Plan:
        return {"": GATHER, "o": ROW}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, Dh), k (B, G, T, Dh) and v (B, G, T, Dv) of x (B, T, D)."""
        raise NotImplementedError

    def project_beside(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, Dh) of x (B, T, D), and k and v (B, G, C + T, ...) of `before` (B, C, D) and x together."""
        q, k, v = self.project(torch.cat((before, x), dim=1))
        return q[:, :, before.shape[1] :], k, v

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory
        q, k, v = map(self.activation, memory.project(self, x))
        q, k = self.qk_norm(q, k)
        v = self.value_mix(v, context.carry)
        memory.leave(x, k, v, context.carry)
        q, k, v = self.position(q, k, v, memory, context.prepared[self.position.key])
        q = self.qk_norm.after_position(q)
        k, v = self.registers(k, v, self.position, n_positions(context.row.size * k.shape[2], context.recalled))
        y = self.sink(self.kernel, q, k, v, context)
        return self.o(self.gate(y, x).transpose(1, 2).flatten(2))  # (B, T, D)

    def key_value_flops_per_token(self) -> int:
        return 2 * self.n_kv_heads * (self.head_dim + self.value_dim) * self.dim


class GQA(GroupedAttention):
    """Grouped-query attention with a matrix each for queries, keys and values. Source: arXiv 2305.13245."""

    class Config(GroupedAttention.Config):
        type: Literal["gqa"] = "gqa"

    def project_with(self, config: GroupedAttention.Config, dim: int, linear: Linear.Config) -> None:
        self.q = linear.build(dim, self.n_heads * self.head_dim, bias="q" in config.bias)
        self.k = linear.build(dim, self.n_kv_heads * self.head_dim, bias="k" in config.bias)
        self.v = linear.build(dim, self.n_kv_heads * self.value_dim, bias="v" in config.bias)

    def tp_plan(self) -> Plan:
        of_keys = kv_heads(self.n_kv_heads)
        return {**super().tp_plan(), "q": heads(self.n_heads), "k": of_keys, "v": of_keys}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head, value = self.head_dim, self.value_dim
        return cut(self.q(x), head), cut(self.k(x), head), cut(self.v(x), value)

    def project_beside(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.cat((before, x), dim=1)
        head, value = self.head_dim, self.value_dim
        return cut(self.q(x), head), cut(self.k(both), head), cut(self.v(both), value)


def cut(x: Tensor, width: int) -> Tensor:
    """(B, T, n * width) -> (B, n, T, width)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)
