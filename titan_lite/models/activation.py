"""Elementwise activations by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid", "tanh", "identity"]


def relu_squared(x: Tensor) -> Tensor:
    """max(0, x)^2. Source: arXiv 2109.08668."""
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": relu_squared,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": _identity,
}


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """The function of that name."""
    return _FUNCTIONS[name]
