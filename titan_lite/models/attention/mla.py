"""Multi-head latent attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.errors import Problem
from titan_lite.config.fields import Count, PositiveInt
from titan_lite.models.attention.gqa import cut
from titan_lite.models.attention.heads import HeadAttention, Kept, undivided
from titan_lite.models.attention.kernel import Eager, Grids, PreparedKernel, Scoring
from titan_lite.models.attention.kernel.base import n_keys
from titan_lite.models.context import Context, n_positions
from titan_lite.models.linear import Linear
from titan_lite.models.norm import Norm, RMSNorm
from titan_lite.models.position import Position
from titan_lite.parallel.plan import GATHER, ROW, SEQ, Plan, heads

if TYPE_CHECKING:
    from titan_lite.job import Job


class MLA(HeadAttention):
    """Keys and values of all heads are made of one latent c = norm(x W_DKV), which is what a cache keeps.

    k_h = [c W_UK_h; RoPE(x W_KR)], v_h = c W_UV_h, q_h = [q_h; RoPE(q'_h)] of x or, with q_rank, of norm(x W_DQ):
    positions act on a part of rope_dim numbers, whose key all heads share. A token's cache is c and that key, (R + Dr)
    numbers in place of 2 H Dh. Where a few queries meet many cached tokens, W_UK moves over to the queries and W_UV
    behind the weighted sum, so that heads attend to the latents themselves. Registers are latents, too. Scores are also
    multiplied by m(mscale_all_dim)^2 of a "yarn" scaling, unless `scale` is a number. There is no qk_norm and no
    value_mix: both act on keys and values of heads, which a cache has none of.
    Source: arXiv 2405.04434, section 2.1 (DeepSeek-V2); torchtitan's and Hugging Face's names of the keys in brackets.
    """

    class Config(HeadAttention.Config):
        type: Literal["mla"] = "mla"
        q_rank: Count = 0
        """Width of the latent that queries are made of (q_lora_rank); 0 = they are made of the input."""
        kv_rank: PositiveInt = Field(examples=[512])
        """Width R of the latent that keys and values are made of (kv_lora_rank)."""
        head_dim: Count = 0
        """Width Dn of the part of a query and key that has no position (qk_nope_head_dim); 0 = dim / n_heads."""
        rope_dim: PositiveInt = Field(examples=[64])
        """Width Dr of the part that positions act on, whose key all heads share (qk_rope_head_dim)."""
        value_dim: Count = 0
        """Width of a value head Dv (v_head_dim); 0 = head_dim."""
        bias: Annotated[tuple[Literal["q", "kv", "o"], ...], Field(strict=False)] = ()
        """Matrices with a bias: of those that make and use a latent, the first."""
        latent_norm: Norm.Config = RMSNorm.Config(eps=1e-6)
        """Norm of both latents."""

        def own_width(self, dim: int) -> int:
            """Dn of a model of this width."""
            return self.head_dim or dim // self.n_heads

        def width(self, dim: int) -> int:
            return self.own_width(dim) + self.rope_dim

        def value_width(self, dim: int) -> int:
            return self.value_dim or self.own_width(dim)

        def kept(self, dim: int) -> Kept:
            return Kept(k=(1, self.rope_dim), v=(1, self.kv_rank))

        def kept_heads(self, dim: int) -> str:
            return 'the one key that all heads share with model.attention.type = "mla"'

        def score_scale(self, head_dim: int) -> float:
            scale = super().score_scale(head_dim)
            return scale * self.position.score_factor() if isinstance(self.scale, str) else scale

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            if not self.head_dim and job.model.dim % self.n_heads:
                yield undivided(self.n_heads, job.model.dim)
            for problem in self.position.head_problems(self.rope_dim):
                yield replace(problem, key=problem.key.replace(".head_dim", ".rope_dim"))

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.parts = (config.own_width(dim), config.rope_dim)
        H, value_dim = config.n_heads, config.value_width(dim)
        self.latent_queries = config.q_rank > 0
        self.q = _queries(config, dim, linear)
        self.kv = LatentKV(config, dim, linear)
        self.o = linear.build(H * value_dim, dim, start="residual", bias="o" in config.bias)
        self.attend_with(config, dim, linear, turned=config.rope_dim, kept=config.kept(dim))
        self.absorbed = Absorbed(self.scoring, config.kv_rank, config.own_width(dim) + value_dim)

    def tp_plan(self) -> Plan:
        # Latents are made of all tokens on every rank; of them, each makes what its own heads need.
        of_queries = {} if self.latent_queries else {"q": heads(self.n_heads)}
        return {"": GATHER, **of_queries, "o": ROW}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, Dn + Dr), the shared key (B, 1, T, Dr) and the latent (B, 1, T, R) of x (B, T, D)."""
        return cut(self.q(x), sum(self.parts)), *self.kv(x)

    def project_beside(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same; shared keys and latents of `before` (B, C, D) and x together."""
        return cut(self.q(x), sum(self.parts)), *self.kv(torch.cat((before, x), dim=1))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory
        q, k, c = memory.project(self, x)
        memory.leave(x, k, c, context.carry)
        own, turned = q.split(self.parts, dim=-1)
        turned, k, c = self.position(turned, k, c, memory, context.prepared[self.position.key])
        k, c = self.registers(k, c, self.position, n_positions(context.row.size * k.shape[2], context.recalled))
        y = self.attend(own, turned, k, c, context)
        return self.o(self.gate(y, x).transpose(1, 2).flatten(2))  # (B, T, D)

    def attend(self, own: Tensor, turned: Tensor, k: Tensor, c: Tensor, context: Context) -> Tensor:
        """(B, H, T, Dv) of queries in two parts (B, H, T, Dn) and (B, H, T, Dr), and what a cache keeps."""
        if context.prepared[self.absorbed.key] is None:
            keys, v = self.kv.expanded(k, c)
            return self.sink(self.kernel, torch.cat((own, turned), dim=-1), keys, v, context)
        to_keys, to_values = self.kv.weights()
        q = torch.cat((own @ to_keys, turned), dim=-1)  # (B, H, T, R + Dr)
        y = self.sink(self.absorbed, q, torch.cat((c, k), dim=-1), c, context)  # (B, H, T, R)
        return y @ to_values.transpose(-2, -1)

    def key_value_flops_per_token(self) -> int:
        return 2 * self.kv.down.weight.numel()

    def shared(self) -> Iterator[Position | PreparedKernel]:
        yield from super().shared()
        yield self.absorbed


class LatentQueries(nn.Module):
    """x (B, T, D) -> norm(x W_DQ) W_UQ."""

    def __init__(self, config: MLA.Config, dim: int, width: int, linear: Linear.Config):
        super().__init__()
        self.down = linear.build(dim, config.q_rank, bias="q" in config.bias)
        self.n_heads = config.n_heads
        self.norm = config.latent_norm.build(dim=config.q_rank)
        self.up = linear.build(config.q_rank, width)

    def tp_plan(self) -> Plan:
        return {"down": SEQ, "norm": SEQ, "up": heads(self.n_heads)}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x)))


def _queries(config: MLA.Config, dim: int, linear: Linear.Config) -> nn.Module:
    """(B, T, D) -> (B, T, H (Dn + Dr))."""
    width = config.n_heads * config.width(dim)
    if config.q_rank:
        return LatentQueries(config, dim, width, linear)
    module: Linear = linear.build(dim, width, bias="q" in config.bias)
    return module


class LatentKV(nn.Module):
    """x (B, T, D) -> the shared key (B, 1, T, Dr), without its position, and the latent c (B, 1, T, R)."""

    def __init__(self, config: MLA.Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.n_heads = config.n_heads
        self.sizes = (config.kv_rank, config.rope_dim)
        self.parts = (config.own_width(dim), config.value_width(dim))
        self.down = linear.build(dim, sum(self.sizes), bias="kv" in config.bias)
        self.norm = config.latent_norm.build(dim=config.kv_rank)
        self.up = linear.build(config.kv_rank, self.n_heads * sum(self.parts))

    def tp_plan(self) -> Plan:
        return {"down": SEQ, "norm": SEQ, "up": heads(self.n_heads)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c, k = self.down(x)[:, None].split(self.sizes, dim=-1)
        return k, self.norm(c)

    def expanded(self, k: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, S, Dn + Dr) and values (B, H, S, Dv) of what is kept."""
        own, v = cut(self.up(c[:, 0]), sum(self.parts)).split(self.parts, dim=-1)
        return torch.cat((own, k.expand(-1, own.shape[1], -1, -1)), dim=-1), v

    def weights(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, Dn, R) and W_UV (H, Dv, R), for use within a forward."""
        to_keys, to_values = self.up.weight.unflatten(0, (-1, sum(self.parts))).split(self.parts, dim=1)
        return to_keys, to_values


class Absorbed(Eager):
    """All heads' queries against one key and value per token: the latents.

    Prepared only where that takes fewer FLOPs than making keys and values of heads anew, of all S tokens for T queries:
    for a token of a text with a cache, and not for the first tokens. Never where a gradient is wanted: backward would
    keep all scores, and a model without memory has none to gain.
    """

    def __init__(self, scoring: Scoring, rank: int, expanded: int):
        """Latents of width `rank` make `expanded` numbers of keys and values in each head."""
        super().__init__(Eager.Config(), scoring)
        self.rank, self.expanded = rank, expanded
        self.key = f"absorbed {rank} {expanded} {scoring.key}"

    def prepare(self, context: Context) -> Grids | None:  # type: ignore[override]
        T, S = context.positions.shape[0], n_keys(context)
        saved = (S - T) * self.rank * self.expanded  # T queries and outputs are absorbed in place of S expansions
        added = T * S * (2 * self.rank - self.expanded)
        pays = S > T and saved > added and not torch.is_grad_enabled()
        return super().prepare(context) if pays else None
