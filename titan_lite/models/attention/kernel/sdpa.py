"""torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.attention.kernel.base import Kernel, Scoring, n_keys
from titan_lite.models.context import Context


class SDPAMask(NamedTuple):
    """Arguments of `scaled_dot_product_attention`: a flag where its own causal mask is enough, else a mask."""

    is_causal: bool
    mask: Tensor | None
    """bool, or float32 with what is added to scores, -inf where nothing may be seen."""


class SDPA(Kernel):
    """torch's `scaled_dot_product_attention`: for a causal mask the fastest of the device. Source: arXiv 2205.14135.

    It takes a bias, such as ALiBi's, in the dtype of the queries: 8 bits of it with bfloat16, where `flex` and `eager`
    add all 24.
    """

    class Config(Kernel.Config):
        type: Literal["sdpa"] = "sdpa"
        scores: ClassVar[tuple[str, ...] | None] = ("softmax",)
        no_dropout: ClassVar[str] = "torch's kernels draw from generators, so that the draw depends on the layout"
        no_lse: ClassVar[str] = "scaled_dot_product_attention keeps the sum of its softmax to itself"

    def __init__(self, config: Config, scoring: Scoring):
        super().__init__()
        self.scoring = scoring
        self.key = f"sdpa {scoring.key}"

    def prepare(self, context: Context) -> SDPAMask:
        """A mask, (T, S), (B, 1, T, S) or with H, only where the built-in causal one does not say it all."""
        size, documents = n_keys(context), context.documents is not None
        if context.first_key is None and self.scoring.plain_causal(len(context.positions), size, documents):
            return SDPAMask(is_causal=True, mask=None)
        if self.scoring.newest_sees_all(context, size):
            return SDPAMask(is_causal=False, mask=None)
        grids = self.scoring.grids(context, size)
        if grids.bias is None:
            return SDPAMask(is_causal=False, mask=grids.allowed)
        mask = torch.where(grids.allowed, grids.bias, float("-inf"))
        return SDPAMask(is_causal=False, mask=mask if mask.dim() == 4 else mask[None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        is_causal, mask = context.prepared[self.key]
        groups = q.shape[1] // k.shape[1]
        if mask is not None:
            if groups > 1 and q.is_cuda:
                # On CUDA the only kernel for grouped heads with a mask holds all scores; the others want as many heads.
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            if mask.is_floating_point():
                # Several of torch's kernels refuse another dtype than that of q, and one misreads it.
                mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scoring.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
