"""Running statistics of summaries, and what is left of a summary once they are taken out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from titan_lite.models.module import Module, Total
from titan_lite.models.spec import Spec


class NoSummaries(Module):
    """For a memory that looks nothing up."""


class Whitening(Module):
    """(h - mean) (covariance + eps)^(-1/2) of summaries h (..., D), in float64.

    Mean and covariance run over the summaries of all rows and ranks of the steps before, each step's weighing `decay`
    times those of the next one; they are buffers of the model, so that a trained one decodes with them. The root is
    the triangular one (Cholesky): lengths and angles are those under any root, the symmetric one of ZCA included, at a
    fraction of its cost. In float64, since eps is far below the rounding of a large covariance in float32.
    """

    mean: Tensor
    covariance: Tensor
    weight: Tensor

    def __init__(self, dim: int, decay: float, eps: float):
        super().__init__()
        self.dim, self.decay, self.eps = dim, decay, eps
        self.register_buffer("mean", torch.empty(dim, dtype=torch.float64))
        self.register_buffer("covariance", torch.empty(dim, dim, dtype=torch.float64))
        self.register_buffer("weight", torch.empty((), dtype=torch.float64))
        self.counted: list[Tensor] = []
        """This step's number of summaries, their sum and the sum of their outer products, less the mean so far."""

    def forward(self, summaries: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D) in float64."""
        spread = self.covariance + self.eps * torch.eye(self.dim, dtype=torch.float64, device=summaries.device)
        root, _ = torch.linalg.cholesky_ex(spread)  # positive by eps: nothing to wait for
        centred = summaries.flatten(0, 1).double() - self.mean
        return torch.linalg.solve_triangular(root, centred.T, upper=False).T.view(summaries.shape)

    def count(self, summaries: Tensor) -> None:
        """Lets summaries (B, n, D) of a training step take part, which `after_step` ends."""
        if not self.training:
            return
        moved = summaries.flatten(0, 1).double() - self.mean
        new = [moved.new_tensor(len(moved)), moved.sum(0), moved.T @ moved]
        self.counted = [old + more for old, more in zip(self.counted, new, strict=True)] if self.counted else new

    def after_step(self, total: Total) -> None:
        if not self.counted:
            return
        n, moved, products = map(total, self.counted)
        self.counted = []
        before = self.decay * self.weight
        weight = before + n
        step = moved / n
        outer = torch.outer(step, step)
        self.covariance.mul_(before / weight).add_((products / n - outer) * (n / weight))
        self.covariance.add_(outer * (before * n / weight.square()))
        self.mean.add_(step * (n / weight))
        self.weight.copy_(weight)

    def param_specs(self) -> dict[str, Spec]:
        return {name: Spec("scalar", 1, self.dim, 0.0) for name in ("mean", "covariance", "weight")}
