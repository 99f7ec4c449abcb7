"""Cross entropy over a vocabulary, with all logits at once or in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from titan_lite.data.batch import IGNORE

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, V) and targets (N,) -> sum of the losses, float32."""


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target], computed in float32; targets of -100 count nothing."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)


class CrossEntropy:
    """Hidden states (B, T, D), output matrix (V, D) and targets (B, T) -> the summed loss.

    With `chunk_tokens` > 0 logits exist for that many tokens at a time: see `_ChunkedLoss`.
    """

    def __init__(self, chunk_tokens: int, token_loss: TokenLoss = summed_cross_entropy):
        self.chunk_tokens = chunk_tokens
        self.token_loss = token_loss

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, D), (N,)
        if 0 < self.chunk_tokens < x.shape[0]:
            return _ChunkedLoss.apply(x, weight, targets, self.chunk_tokens, self.token_loss)
        return self.token_loss(F.linear(x, weight), targets)


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of x W^T, one chunk of tokens after the other.

    The gradient of each chunk's logits is taken in the forward pass and turned into its share of the gradients of x and W at
    once, so that only one chunk's logits ever exist and nothing is computed twice; backward only scales.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, token_loss: TokenLoss
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        x_grad = torch.empty_like(x) if needs_grad else None
        weight_grad = torch.zeros_like(weight) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(x[rows], weight)
            if x_grad is None or weight_grad is None:
                total += token_loss(logits, targets[rows])
                continue
            with torch.enable_grad():
                loss = token_loss(logits.requires_grad_(), targets[rows])
            (logits_grad,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            torch.mm(logits_grad, weight, out=x_grad[rows])
            weight_grad.addmm_(logits_grad.t(), x[rows])
        ctx.save_for_backward(x_grad, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad.mul_(grad.to(x_grad.dtype)), weight_grad.mul_(grad.to(weight_grad.dtype)), None, None, None
