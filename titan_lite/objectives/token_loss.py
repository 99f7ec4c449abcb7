"""Losses of logits, summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.data.batch import IGNORE
from titan_lite.models.ranks import Ranks


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


class SplitTokenLoss(TokenLoss):
    """Another loss, of logits (N, V / n): each rank has those of some tokens of the vocabulary, one after the other.

    Ranks tell each other three numbers a token: its largest logit, the sum of its exponentials, its target's logit.
    """

    def __init__(self, whole: TokenLoss, ranks: Ranks):
        self.whole, self.ranks = whole, ranks

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        x = logits.float()
        number, elsewhere = self._own(targets, x.shape[1])
        own = x.logsumexp(dim=1)  # (N,)
        picked = x.gather(1, number[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        peak = self.ranks.max(own)
        total, picked = self.ranks.sum_alike(torch.stack((torch.exp(own - peak), picked))).unbind()
        lse = total.log() + peak
        return self.whole.of_lse(lse - picked, lse).masked_fill(targets == IGNORE, 0.0).sum()

    def with_gradient_(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = logits.float()
        number, elsewhere = self._own(targets, x.shape[1])
        picked = x.gather(1, number[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        peak = self.ranks.max(x.amax(dim=1))
        x = x.sub_(peak[:, None]).exp_()
        total, picked = self.ranks.sum(torch.stack((x.sum(dim=1), picked))).unbind()
        lse = total.log() + peak
        ignored = targets == IGNORE
        loss = self.whole.of_lse(lse - picked, lse).masked_fill(ignored, 0.0).sum()
        gradient = x.div_(self.whole.divisor(total, lse)[:, None])
        gradient.scatter_add_(1, number[:, None], elsewhere[:, None].to(x.dtype) - 1)
        return loss, gradient.mul_(~ignored[:, None])

    def _own(self, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Each target's number among this rank's `size` tokens, any where it is not among them; where it is not."""
        number = targets - self.ranks.rank * size
        elsewhere = (number < 0) | (number >= size)
        return number.masked_fill(elsewhere, 0), elsewhere


class GatheredTokenLoss(TokenLoss):
    """Another loss, of logits that are spread over ranks as those of `SplitTokenLoss`: every rank gathers all."""

    def __init__(self, whole: TokenLoss, ranks: Ranks):
        self.whole, self.ranks = whole, ranks

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.whole(self.ranks.whole(logits), targets)

    def with_gradient_(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = self.whole.with_gradient_(self.ranks.whole(logits.float()), targets)
        return loss, gradient.chunk(self.ranks.size, dim=1)[self.ranks.rank].contiguous()


def token_loss(z_loss: float, ranks: Ranks, gather: bool) -> TokenLoss:
    """The loss of logits that `ranks` have a part of the vocabulary of each; with `gather`, each computes all of it."""
    whole = WithZLoss(z_loss) if z_loss else TokenLoss()
    if ranks.size == 1:
        return whole
    return GatheredTokenLoss(whole, ranks) if gather else SplitTokenLoss(whole, ranks)
