"""Attention to some of the keys: results of which several, of different keys, are merged into the whole one.

With y = softmax(s) v over some keys and lse = log(sum(exp(s))), the results of two sets of keys are to be weighted by
exp(lse - log(exp(lse_1) + exp(lse_2))). Backward needs no partial result: with the whole ones, the weights of any keys
are exp(s - lse), and d s = weights * (d weights - sum(d y * y)). Source: arXiv 2205.14135, appendix B.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from titan_lite.models.attention.kernel import Scoring
from titan_lite.models.attention.kernel.eager import stacked
from titan_lite.models.dropout import Dropout, Noise

LOWEST = torch.finfo(torch.float32).min
FLASH_DTYPES = (torch.float16, torch.bfloat16)
WIDEST_FLASH_HEAD = 256


class Part(NamedTuple):
    """Keys with their values, and which of a rank's queries may see any of them."""

    kv: Tensor
    """(B, G, S, Dh + Dv)"""
    positions: Tensor | None
    """(S,) of the keys in their row; None for registers, which have none and which all queries see."""
    first: int = 0
    """Queries before this one of the rank come before all of these keys. The others come after all of them, but for"""
    diagonal: bool = False
    """the rank's own tokens: there each query comes after the keys before its own."""


class Surroundings(NamedTuple):
    """Facts of one forward about a rank's queries."""

    positions: Tensor
    """(T,)"""
    n_tokens: int
    """Of a whole row."""
    documents: Tensor | None
    """(B, tokens of the whole row), where a mask reads them."""
    noise: Noise | None


class Whole(NamedTuple):
    """What backward knows of the merged result, for some queries."""

    grad: Tensor
    """(B, H, T, Dv)"""
    y: Tensor
    lse: Tensor
    """(B, H, T) in float32"""
    delta: Tensor
    """(B, H, T) in float32: sum(grad * y), less the gradient of lse."""

    def behind(self, first: int) -> Whole:
        """That of the queries from `first` on."""
        return Whole(*(x[:, :, first:] for x in self))


class Partial(Protocol):
    """Attention of queries q (B, H, T, Dh) to the keys of a part."""

    def forward(self, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        """(B, H, T, Dv), and the lse (B, H, T) in float32: -inf, beside a 0, where a query sees nothing."""
        ...

    def backward(self, whole: Whole, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        """The gradients of q and of the part's kv."""
        ...


def merge(y: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The result, in float32, of two sets of keys; the last queries alone may have seen the new one."""
    before = y.shape[2] - new.shape[2]
    kept, old = lse[:, :, before:], y[:, :, before:]
    total = torch.logaddexp(kept, new_lse)
    both = old * (kept - total).exp()[..., None] + new * (new_lse - total).exp()[..., None]
    if not before:
        return both, total
    return torch.cat((y[:, :, :before], both), dim=2), torch.cat((lse[:, :, :before], total), dim=2)


class WrittenOut:
    """As `Eager` does it, with all scores of a part in memory: every mask, bias, cap and dropout, on any device."""

    def __init__(self, scoring: Scoring, width: int, dropout: Dropout | None):
        """`width` is that of a key."""
        self.scoring, self.width, self.dropout = scoring, width, dropout

    def forward(self, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        v = part.kv[..., self.width :]
        scores, _ = self._scores(q, part, around)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.clamp(min=LOWEST)[..., None])
        factors = self._factors(q, part, around)
        dropped = weights if factors is None else weights * factors
        return (stacked(dropped.to(v.dtype), v.shape[1]) @ v).view(*q.shape[:3], -1), lse

    def backward(self, whole: Whole, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        k, v = part.kv.split((self.width, part.kv.shape[-1] - self.width), dim=-1)
        scores, capped = self._scores(q, part, around)
        weights = torch.exp(scores - whole.lse[..., None])
        factors = self._factors(q, part, around)
        dropped = weights if factors is None else weights * factors
        grad = stacked(whole.grad, k.shape[1])
        of_values = stacked(dropped.to(v.dtype), k.shape[1]).mT @ grad
        of_weights = (grad @ v.mT).float().view(scores.shape)
        if factors is not None:
            of_weights = of_weights * factors
        of_scores = weights * (of_weights - whole.delta[..., None])
        of_products = stacked(self.scoring.score.uncapped(of_scores, capped) * self.scoring.scale, k.shape[1])
        of_products = of_products.to(q.dtype)
        of_queries = (of_products @ k).view(q.shape)
        return of_queries, torch.cat((of_products.mT @ stacked(q, k.shape[1]), of_values), dim=-1)

    def _scores(self, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        """(B, H, T, S) in float32, -inf where a mask says no; and before bias and masks."""
        k = part.kv[..., : self.width]
        products = (stacked(q, k.shape[1]) @ k.mT).float().view(*q.shape[:3], -1) * self.scoring.scale
        capped = self.scoring.score.capped(products)
        if part.positions is None:
            return capped, capped
        at, keys = around.positions[part.first :, None], part.positions[None, :]
        documents: tuple[Tensor | None, Tensor | None] = (None, None)
        if around.documents is not None:
            of_queries = around.documents[:, around.positions[part.first :]]
            documents = of_queries[:, None, :, None], around.documents[:, part.positions][:, None, None, :]
        bias = self.scoring.bias.grid(at, keys)
        scores = capped if bias is None else capped + bias
        return torch.where(self.scoring.allowed(at, keys, *documents), scores, float("-inf")), capped

    def _factors(self, q: Tensor, part: Part, around: Surroundings) -> Tensor | None:
        """(B, H, T, S): what dropout multiplies weights by. Their numbers are those of all heads, queries and keys."""
        dropout = self.dropout
        if dropout is None or around.noise is None:
            return None
        n_heads, size = q.shape[1], self.scoring.registers + around.n_tokens
        heads = dropout.part * n_heads + torch.arange(n_heads, device=q.device)[:, None, None]
        queries = around.positions[part.first :, None]
        registers = torch.arange(self.scoring.registers, device=q.device)
        keys = registers if part.positions is None else self.scoring.registers + part.positions
        number = (heads * around.n_tokens + queries) * size + keys
        bits = dropout.bits_of(around.noise, number.flatten().to(torch.int32))
        return dropout.kept(bits).view(-1, *number.shape) * dropout.factor


class Flash:
    """torch's flash attention, which holds no scores: for keys that no mask but the causal one hides."""

    def __init__(self, scale: float, width: int):
        self.scale, self.width = scale, width

    def forward(self, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        k, v = part.kv.split(self.width, dim=-1)
        if q.is_cuda:
            y, lse, *_ = self._on_cuda(q, k, v, part)
            return y, lse
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, part.diagonal, scale=self.scale)

    def backward(self, whole: Whole, q: Tensor, part: Part, around: Surroundings) -> tuple[Tensor, Tensor]:
        k, v = part.kv.split(self.width, dim=-1)
        known = whole.y.to(q.dtype), whole.lse
        if q.is_cuda:
            return self._backward_on_cuda(whole.grad, *known, q, k, v, part)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_q, *of_kv = backward(whole.grad, q, k, v, *known, 0.0, part.diagonal, scale=self.scale)
        return of_q, torch.cat(of_kv, dim=-1)

    def _on_cuda(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, ...]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, part.diagonal, False, scale=self.scale)

    def _backward_on_cuda(
        self, grad: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, part: Part
    ) -> tuple[Tensor, Tensor]:
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        k, v = k.repeat_interleave(groups[1], dim=1), v.repeat_interleave(groups[1], dim=1)
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)
        state = (None, None, q.shape[2], k.shape[2], 0.0, part.diagonal, nothing, nothing)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        of_q, *of_kv = backward(grad, q, k, v, y, lse, *state, scale=self.scale)
        return of_q, torch.cat([x.unflatten(1, groups).sum(2) for x in of_kv], dim=-1)
