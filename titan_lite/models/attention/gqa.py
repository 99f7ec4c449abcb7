"""Grouped-query attention, with multi-head and multi-query attention as its ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.models.attention.base import Attention
from titan_lite.models.attention.kernel import SDPA, Kernel, PreparedKernel
from titan_lite.models.attention.mask import Causal, Mask
from titan_lite.models.context import Context
from titan_lite.models.linear import Linear
from titan_lite.models.position import Position, RoPE

if TYPE_CHECKING:
    from titan_lite.job import Job


class GQA(Attention):
    """H query heads share G key/value heads: head h reads key/value head floor(h G / H). Source: arXiv 2305.13245."""

    class Config(Attention.Config):
        type: Literal["gqa"] = "gqa"
        n_heads: Annotated[int, Field(gt=0)] = 8
        """Query heads H."""
        n_kv_heads: Annotated[int, Field(ge=0)] = 0
        """Key/value heads G, a divisor of n_heads; 0 = n_heads (multi-head attention)."""
        head_dim: Annotated[int, Field(ge=0)] = 0
        """Width of a head Dh; 0 = dim / n_heads."""
        position: Position.Config = RoPE.Config()
        """Position encoding of queries and keys."""
        masks: Annotated[tuple[Mask.Config, ...], Field(strict=False, min_length=1)] = (Causal.Config(),)
        """What a query may see; all of them must allow it."""
        kernel: Kernel.Config = SDPA.Config()
        """What computes the attention."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if not any(isinstance(mask, Causal.Config) for mask in self.masks):
                yield Problem(
                    code=CROSS_FIELD,
                    key=".masks",
                    value=[mask.model_dump() for mask in self.masks],
                    why='lacks "causal": next-token training would see its targets',
                    allowed='a list with { type = "causal" }, and more masks if wanted',
                )
            if self.n_kv_heads and self.n_heads % self.n_kv_heads:
                divisors = [g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
                yield Problem(
                    code=CROSS_FIELD,
                    key=".n_kv_heads",
                    value=self.n_kv_heads,
                    why=f"must divide model.attention.n_heads ({self.n_heads})",
                    allowed=", ".join(map(str, divisors)),
                )
            if not self.head_dim and job.model.dim % self.n_heads:
                yield Problem(
                    code=CROSS_FIELD,
                    key=".n_heads",
                    value=self.n_heads,
                    why=f"must divide model.dim ({job.model.dim}) where head_dim is not given",
                    allowed="a divisor of model.dim, or set model.attention.head_dim",
                )
            elif (self.head_dim or job.model.dim // self.n_heads) % 2:
                yield Problem(
                    code=CROSS_FIELD,
                    key=".head_dim",
                    value=self.head_dim or job.model.dim // self.n_heads,
                    why="rotary positions turn pairs of a head's numbers, so its width must be even",
                    allowed="an even number",
                )

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.n_heads = config.n_heads
        self.head_dim = config.head_dim or dim // config.n_heads
        n_kv_heads = config.n_kv_heads or config.n_heads
        self.q = linear.build(dim, config.n_heads * self.head_dim)
        self.k = linear.build(dim, n_kv_heads * self.head_dim)
        self.v = linear.build(dim, n_kv_heads * self.head_dim)
        self.o = linear.build(config.n_heads * self.head_dim, dim, start="residual")
        self.position = config.position.build(head_dim=self.head_dim)
        self.kernel = config.kernel.build(masks=[mask.build() for mask in config.masks])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, Dh)
        v = self.v(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, Dh)
        q, k = self.position(q, k, context.prepared[self.position.key])
        k, v = context.memory.extend(k, v)  # (B, G, S, Dh)
        y = self.kernel(q, k, v, context.prepared[self.kernel.key])
        return self.o(y.transpose(1, 2).reshape(B, T, -1))

    def shared(self) -> Iterator[Position | PreparedKernel]:
        yield self.position
        yield self.kernel

    def score_flops_per_token(self, seq_len: int) -> int:
        return 4 * self.n_heads * self.head_dim * seq_len
