"""Normalisation of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.learned_scale import LearnedScale
from titan_lite.models.module import Module
from titan_lite.models.norm import L2Norm, RMSNorm
from titan_lite.models.ranks import Ranks
from titan_lite.models.spec import Spec
from titan_lite.parallel.plan import Plan, heads, kv_heads


class QKNorm(Module):
    """q (B, H, T, Dh), k (B, G, T, Dh) -> the same, normalised, before positions act on them.

    A norm commutes with a rotation, a gain does not. A gain that belongs behind the rotation is applied by
    `after_position` to the queries alone, those of the keys included: scores are the same, and cached keys need no
    second look. Built as `build(dim=, n_heads=, n_kv_heads=, head_dim=)`.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "qk_norm"
        default_type: ClassVar[str | None] = "none"

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def after_position(self, q: Tensor) -> Tensor:
        """q (B, H, T, Dh) with the gains that act behind the position encoding."""
        return q


class NoQKNorm(QKNorm):
    """Queries and keys as projected."""

    class Config(QKNorm.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class RMSQKNorm(QKNorm):
    """RMSNorm of each head, with one gain (Dh,) that all query heads share and one for the key heads.

    Source: arXiv 2505.09388 (Qwen3), arXiv 2503.19786 (Gemma 3).
    """

    class Config(QKNorm.Config):
        type: Literal["rms"] = "rms"
        eps: PositiveFloat = 1e-6
        """Added to the mean square, inside the root."""

    def __init__(self, config: Config, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        norm = RMSNorm.Config(eps=config.eps)
        self.q, self.k = norm.build(dim=head_dim), norm.build(dim=head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(q), self.k(k)


class GainlessQKNorm(QKNorm):
    """RMSNorm of each head, without gains. Source: arXiv 2404.05728."""

    class Config(QKNorm.Config):
        type: Literal["rms_gainless"] = "rms_gainless"
        eps: PositiveFloat = 1e-6
        """Added to the mean square, inside the root."""

    def __init__(self, config: Config, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        self.norm = RMSNorm.Config(eps=config.eps, gain="none").build(dim=head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(q), self.norm(k)


class FullQKNorm(QKNorm):
    """RMSNorm over the numbers of all heads together, with a gain for each: (H Dh,) and (G Dh,).

    Source: arXiv 2501.00656 (OLMo 2), which normalises before the heads are split.
    """

    class Config(QKNorm.Config):
        type: Literal["rms_full"] = "rms_full"
        eps: PositiveFloat = 1e-6
        """Added to the mean square, inside the root."""

    def __init__(self, config: Config, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        norm = RMSNorm.Config(eps=config.eps)
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.q, self.k = norm.build(dim=n_heads * head_dim), norm.build(dim=n_kv_heads * head_dim)
        self.normalised: Normalised = _as_it_is

    def tp_plan(self) -> Plan:
        return {"q": heads(self.n_heads), "k": kv_heads(self.n_kv_heads)}

    def split(self, ranks: Ranks) -> None:
        super().split(ranks)
        self.normalised = partial(_over_ranks, ranks)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._over_heads(self.q, q), self._over_heads(self.k, k)

    def _over_heads(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """A norm of width n * Dh on x (B, n, T, Dh)."""
        x = x.transpose(1, 2)  # (B, T, n, Dh)
        return self.normalised(norm, x.flatten(2)).view_as(x).transpose(1, 2)


Normalised: TypeAlias = Callable[[RMSNorm, Tensor], Tensor]


def _as_it_is(norm: RMSNorm, x: Tensor) -> Tensor:
    y: Tensor = norm(x)
    return y


def _over_ranks(ranks: Ranks, norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm of what the ranks' x (B, T, width) are together; where several have the same, it counts once."""
    wide = x.float()
    copies = ranks.size * x.shape[-1] // norm.dim
    square = ranks.sum(wide.square().sum(-1, keepdim=True)) / (copies * norm.dim)
    assert norm.weight is not None
    return (wide * torch.rsqrt(square + norm.eps) * norm.weight).type_as(x)


class PerHeadQKNorm(QKNorm):
    """y = g_h * x / (sqrt(mean(x^2)) + eps) with a gain (Dh,) for each head, in float32.

    Source: the code of arXiv 2405.20053 (LSWT), which adds eps to the root; RMSNorm has it inside.
    """

    class Config(QKNorm.Config):
        type: Literal["rms_per_head"] = "rms_per_head"
        eps: PositiveFloat = 1e-5
        """Added to the root of the mean square."""

    def __init__(self, config: Config, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        self.eps, self.head_dim = config.eps, head_dim
        self.q = nn.Parameter(torch.empty(n_heads, head_dim))
        self.k = nn.Parameter(torch.empty(n_kv_heads, head_dim))
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads

    def tp_plan(self) -> Plan:
        return {"q": heads(self.n_heads), "k": kv_heads(self.n_kv_heads)}

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._normalised(q, self.q), self._normalised(k, self.k)

    def _normalised(self, x: Tensor, gain: Tensor) -> Tensor:
        wide = x.float()
        # As a vector norm, whose gradient at x = 0 is 0 and not the infinite one of a square root.
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * self.head_dim**-0.5
        return (wide / (root + self.eps) * gain[:, None]).type_as(x)

    def param_specs(self) -> dict[str, Spec]:
        return {"q": Spec("norm", 1, self.head_dim, 1.0), "k": Spec("norm", 1, self.head_dim, 1.0)}


class L2ScaledQKNorm(QKNorm):
    """Queries and keys of length 1, times learned s_q (H Dh,) and s_k (G Dh,) behind the rotation.

    Both scales start at 1 and move by sqrt(dim) * lr. Where each query head has a key head of its own, the two are one
    s_qk, as in the paper, which has no grouped heads. Source: arXiv 2410.01131, section 2.3.2.
    """

    class Config(QKNorm.Config):
        type: Literal["l2_scaled"] = "l2_scaled"

        def build(self, *args: Any, **sizes: Any) -> L2ScaledQKNorm:
            grouped = sizes["n_kv_heads"] < sizes["n_heads"]
            return (L2ScaledQKNorm if grouped else SharedL2ScaledQKNorm)(self, *args, **sizes)

    def __init__(self, config: Config, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.norm = L2Norm.Config().build(dim=head_dim)
        self.make_scales(dim)

    def make_scales(self, dim: int) -> None:
        """Makes what `gain` reads."""
        self.s_q = LearnedScale(self.n_heads * self.head_dim, init=1.0, scale=dim**-0.5)
        self.s_k = LearnedScale(self.n_kv_heads * self.head_dim, init=1.0, scale=dim**-0.5)

    def tp_plan(self) -> Plan:
        return {"s_q": heads(self.n_heads), "s_k": kv_heads(self.n_kv_heads)}

    def gain(self) -> Tensor:
        """The product of the scales that meet in a score, (G, H / G, Dh): key head g serves the heads of its group."""
        s_k = self.s_k().view(-1, 1, self.head_dim)
        return self.s_q().view(s_k.shape[0], -1, self.head_dim) * s_k

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(q), self.norm(k)

    def after_position(self, q: Tensor) -> Tensor:
        return q * self.gain().view(-1, 1, self.head_dim).type_as(q)


class SharedL2ScaledQKNorm(L2ScaledQKNorm):
    """`L2ScaledQKNorm` with one s_qk (H Dh,) for queries and keys.

    Trained with Adam it goes the way of two that start alike: their gradients are alike, and so are the steps.
    """

    def make_scales(self, dim: int) -> None:
        self.s_qk = LearnedScale(self.n_heads * self.head_dim, init=1.0, scale=dim**-0.5)

    def tp_plan(self) -> Plan:
        return {"s_qk": heads(self.n_heads)}

    def gain(self) -> Tensor:
        return self.s_qk() ** 2
