"""Losses of logits, summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.data.batch import IGNORE


class TokenLoss:
    """Cross entropy: the sum over tokens of -log softmax(logits)[target], in float32; targets of -100 count nothing."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, V) and targets (N,) to the sum, differentiable."""
        return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)

    def with_gradient_(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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
        lse = total.log() + peak
        loss = self.of_lse(lse - picked, lse).masked_fill(~counted, 0.0).sum()
        gradient = x.div_(self.divisor(total, lse)).scatter_add_(1, target, torch.full_like(picked, -1.0))
        return loss, gradient.mul_(counted)

    def of_lse(self, cross_entropy: Tensor, lse: Tensor) -> Tensor:
        """Each token's loss, given its cross entropy and the log of its sum of exponentials."""
        return cross_entropy

    def divisor(self, total: Tensor, lse: Tensor) -> Tensor:
        """What exponentials are divided by to give d loss / d logits, but for the target's -1; `total` is their sum."""
        return total


class WithZLoss(TokenLoss):
    """Cross entropy + c * logsumexp(logits)^2: holds the softmax's normaliser near 1. Source: arXiv 2204.02311, 5.

    The gradient is (1 + 2 c lse) softmax(logits) - onehot(target).
    """

    def __init__(self, coefficient: float):
        self.coefficient = coefficient

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        lse = logits.float().logsumexp(dim=1)
        squares = lse.square().masked_fill(targets == IGNORE, 0.0).sum()
        return super().__call__(logits, targets) + self.coefficient * squares

    def of_lse(self, cross_entropy: Tensor, lse: Tensor) -> Tensor:
        return cross_entropy + self.coefficient * lse.square()

    def divisor(self, total: Tensor, lse: Tensor) -> Tensor:
        return total / (1 + 2 * self.coefficient * lse)
