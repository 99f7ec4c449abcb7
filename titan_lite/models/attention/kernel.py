"""Attention kernels: softmax(q k^T / sqrt(Dh) + mask) v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.models.attention.mask import Causal, Mask
from titan_lite.models.context import Context
from titan_lite.models.module import Module


class PreparedKernel(Protocol):
    """A kernel that shares its mask between layers; see `Kernel`."""

    key: str

    def prepare(self, context: Context) -> Any: ...


class Kernel(Module):
    """q (B, H, T, Dh), k and v (B, G, S, Dh) -> (B, H, T, Dh); G divides H; the last T of S keys are the queries' own.

    `prepare` turns the masks into what the kernel wants, once per forward for all layers whose `key` is the same.
    """

    key: str

    class Config(SlotConfig):
        slot: ClassVar[str] = "kernel"
        default_type: ClassVar[str | None] = "sdpa"

    def prepare(self, context: Context) -> Any:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Any) -> Tensor:
        raise NotImplementedError


class SDPAMask(NamedTuple):
    """Arguments of `scaled_dot_product_attention`: a flag where its own causal mask is enough, else a boolean mask."""

    is_causal: bool
    mask: Tensor | None


class SDPA(Kernel):
    """torch's `scaled_dot_product_attention`: the fastest implementation of the device. Source: arXiv 2205.14135."""

    class Config(Kernel.Config):
        type: Literal["sdpa"] = "sdpa"

    def __init__(self, config: Config, masks: Sequence[Mask]):
        super().__init__()
        self.masks = tuple(masks)
        self.key = "sdpa " + " ".join(mask.config.model_dump_json() for mask in masks)

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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: SDPAMask) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if prepared.mask is not None and groups > 1 and q.is_cuda:
            # On CUDA the only kernel for grouped heads with a mask holds all scores; the others want as many heads.
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=prepared.mask, is_causal=prepared.is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
