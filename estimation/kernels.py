"""Operations as a CUDA device runs them, for traces that are made on a CPU.

What a CPU computes in several operations, each with a result of its own, is one kernel on a device. Modelled here:
RMSNorm (`aten._fused_rms_norm`: keeps its input and one float32 number per row). The same on both: LayerNorm, softmax,
SwiGLU as separate products, and attention (flash attention on a CPU, too, keeps q, k, v, the output and its
log-sum-exp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from estimation.instead import instead

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


@contextmanager
def composite_kernels() -> Iterator[None]:
    """Inside, functions are what a compiler sees of them: it makes kernels of its own of their parts."""
    with instead(F, rms_norm=_original):
        yield


@contextmanager
def device_kernels() -> Iterator[None]:
    """Inside, a fake step keeps what it would keep on a device."""
    with instead(F, rms_norm=_rms_norm):
        yield
