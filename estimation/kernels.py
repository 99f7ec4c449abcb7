"""Operations as a CUDA device runs them, for traces that are made on a CPU.

What a CPU computes in several operations, each with a result of its own, is one kernel on a device. Modelled here:
RMSNorm (`aten._fused_rms_norm`: keeps its input and one float32 number per row), and flex attention where CUDA would
take it, which keeps what flash attention keeps. The same on both: LayerNorm, softmax, SwiGLU as separate products, and
flash attention, which keeps q, k, v, the output and its log-sum-exp on a CPU, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from estimation.instead import instead
from titan_lite.models.attention.kernel import Auto
from titan_lite.models.attention.kernel.base import n_keys
from titan_lite.models.attention.kernel.flex import BLOCK, Flex
from titan_lite.models.attention.mask import Causal
from titan_lite.models.context import Context

_original = F.rms_norm


class _FusedRMSNorm(torch.autograd.Function):
    """Shapes and storages of the fused kernel; its numbers are not computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, n_dims: int) -> Tensor:
        rstd = x.new_empty((*x.shape[: x.ndim - n_dims], *(1,) * n_dims), dtype=torch.float32)
        ctx.save_for_backward(x, rstd, *([] if weight is None else [weight]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, _, *weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight[0]) if weight else None, None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _FusedRMSNorm.apply(x, weight, len(shape))


_skips_on = Auto._skips


def _skips(kernel: Auto, device: torch.device, n_queries: int, n_keys: int, documents: bool) -> bool:
    return _skips_on(kernel, torch.device("cuda"), n_queries, n_keys, documents)


def _blocks(kernel: Flex, context: Context) -> list[Tensor]:
    """As large as what says which blocks of scores are computed: by row of blocks and by column, in part and whole."""
    documents = kernel.scoring.documents(context)
    rows, queries = 1 if documents is None else len(documents), -(-len(context.positions) // BLOCK)
    keys = -(-(kernel.scoring.registers + n_keys(context)) // BLOCK)
    return [torch.empty((rows, 1, queries, keys), dtype=torch.int32) for _ in range(4)]


def _flex(kernel: Flex, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    causal = q.shape[2] == k.shape[2] and any(isinstance(mask, Causal) for mask in kernel.scoring.masks)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _flex_with_lse(kernel: Flex, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    return _flex(kernel, q, k, v, context), q.new_empty(q.shape[:-1], dtype=torch.float32)


@contextmanager
def composite_kernels() -> Iterator[None]:
    """Inside, functions are what a compiler sees of them: it makes kernels of its own of their parts."""
    with instead(F, rms_norm=_original):
        yield


@contextmanager
def device_kernels() -> Iterator[None]:
    """Inside, a fake step keeps what it would keep on a device."""
    flex = instead(Flex, prepare=_blocks, forward=_flex, with_lse=_flex_with_lse)
    with instead(F, rms_norm=_rms_norm), instead(Auto, _skips=_skips), flex:
        yield
