"""Losses that a module deep in the model adds to the objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_lite.models.module import Module


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def add_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, unchanged; in backward, `loss` (a scalar) is minimised along with the objective.

    The objective is a mean over the tokens of the global batch, and gradients are summed over micro-batches and ranks:
    a loss that is a sum over tokens is to be multiplied by `context.token_weight` first.
    """
    return _AddLoss.apply(x, loss)


def token_weight(device: torch.device, n_tokens: float) -> Tensor:
    """What multiplies a loss that is summed over tokens; a tensor: compiled blocks must not depend on its value."""
    # A fill and not a copy, which would wait for the device.
    return torch.full((), 1 / n_tokens, device=device)


def no_token_weight(n_tokens: float) -> None:
    """The token weight of a model in which nothing asks for it."""


def weighs_tokens(model: nn.Module) -> bool:
    """Whether any part of the model asks for `context.token_weight`."""
    return any(isinstance(module, Module) and module.weighs_tokens for module in model.modules())
