"""torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.attention.kernel.base import Kernel, Scoring
from titan_lite.models.attention.mask import Causal
from titan_lite.models.context import Context


class SDPAMask(NamedTuple):
    """Arguments of `scaled_dot_product_attention`: a flag where its own causal mask is enough, else a boolean mask."""

    is_causal: bool
    mask: Tensor | None


class SDPA(Kernel):
    """torch's `scaled_dot_product_attention`: the fastest implementation of the device. Source: arXiv 2205.14135."""

    class Config(Kernel.Config):
        type: Literal["sdpa"] = "sdpa"

    def __init__(self, config: Config, scoring: Scoring):
        super().__init__()
        self.scoring = scoring
        self.masks = scoring.masks
        self.key = f"sdpa {scoring.key}"

    def prepare(self, context: Context) -> SDPAMask:
        """An explicit mask, (T, S) or (B, 1, T, S), only where the built-in causal one does not say it all."""
        documents = context.documents
        start = context.memory.length
        plain = all(isinstance(mask, Causal) for mask in self.masks)
        if plain and len(self.masks) == 1 and start == 0:
            return SDPAMask(is_causal=True, mask=None)
        q = context.positions[:, None]
        k = torch.arange(start + q.shape[0], device=q.device)[None, :]
        document_pair = (
            (None, None) if documents is None else (documents[:, None, :, None], documents[:, None, None, :])
        )
        grids = [mask.allowed(q, k, *document_pair) for mask in self.masks]
        given = [grid for grid in grids if grid is not None]
        if not given:
            return SDPAMask(is_causal=False, mask=None)
        allowed = given[0]
        for grid in given[1:]:
            allowed = allowed & grid
        return SDPAMask(is_causal=False, mask=allowed)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        prepared: SDPAMask = context.prepared[self.key]
        groups = q.shape[1] // k.shape[1]
        if prepared.mask is not None and groups > 1 and q.is_cuda:
            # On CUDA the only kernel for grouped heads with a mask holds all scores; the others want as many heads.
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=prepared.mask,
            is_causal=prepared.is_causal,
            scale=self.scoring.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
