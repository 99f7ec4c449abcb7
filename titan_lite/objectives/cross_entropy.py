"""Cross entropy over a vocabulary, with all logits at once or in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from titan_lite.data.batch import IGNORE

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A function to a function that computes the same, such as torch.compile."""


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target], computed in float32; targets of -100 count nothing."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)


def summed_cross_entropy_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum and its gradient softmax(logits) - onehot(target), in float32 (N, V).

    Overwrites float32 logits with the gradient, so that no second tensor of their size exists.
    """
    x = logits.float()
    counted = (targets != IGNORE)[:, None]  # (N, 1)
    target = targets[:, None].clamp(min=0)
    picked = x.gather(1, target)
    peak = x.amax(dim=1, keepdim=True)
    x = x.sub_(peak).exp_()
    total = x.sum(dim=1, keepdim=True)
    loss = (total.log() + peak - picked).masked_fill(~counted, 0.0).sum()
    gradient = x.div_(total).scatter_add_(1, target, torch.full_like(picked, -1.0))
    return loss, gradient.mul_(counted)


class CrossEntropy:
    """Hidden states (B, T, D), output matrix (V, D) and targets (B, T) -> the summed loss.

    With `chunk_tokens` > 0 logits exist for that many tokens at a time: see `_ChunkedLoss`.
    """

    def __init__(self, chunk_tokens: int, wrap: Wrap = lambda function: function):
        """`wrap` is applied to the functions of logits, to compile them."""
        self.chunk_tokens = chunk_tokens
        self.loss = wrap(summed_cross_entropy)
        self.loss_and_gradient = wrap(summed_cross_entropy_and_gradient)

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, D), (N,)
        if 0 < self.chunk_tokens < x.shape[0]:
            return _ChunkedLoss.apply(x, weight, targets, self)
        return self.loss(F.linear(x, weight), targets)


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of x W^T, one chunk of tokens after the other.

    Each chunk's logit gradient is taken in forward and turned at once into its share of those of x and W, so that
    only one chunk's logits ever exist and nothing is computed twice; backward only scales.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cross_entropy: CrossEntropy) -> Tensor:
        needs_grad = any(ctx.needs_input_grad[:2])
        x_grad = torch.empty_like(x) if needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], cross_entropy.chunk_tokens):
            rows = slice(start, start + cross_entropy.chunk_tokens)
            logits = F.linear(x[rows], weight)
            if x_grad is None or weight_grad is None:
                total += cross_entropy.loss(logits, targets[rows])
                continue
            loss, logits_grad = cross_entropy.loss_and_gradient(logits, targets[rows])
            total += loss
            logits_grad = logits_grad.to(weight.dtype)
            torch.mm(logits_grad, weight, out=x_grad[rows])
            add_product_(weight_grad, logits_grad.t(), x[rows])
            del logits, logits_grad  # before the next chunk's exist
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_grad, weight_grad = ctx.saved_tensors
        # The factor stays in float32: rounded to bfloat16 it would put the same error on every gradient.
        return x_grad.mul_(grad), weight_grad.mul_(grad).to(ctx.weight_dtype), None, None


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with a float32 total also for bfloat16 factors: sums over chunks would lose bits in those."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
