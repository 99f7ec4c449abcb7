"""How tokens reach the experts that they chose, as modules with experts see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titan_lite.models.ranks import ALONE, Ranks

Experts = Callable[[Tensor, Tensor], Tensor]
"""Tokens sorted by expert (M, D) and where each expert's end -> (M, D)."""


class Dispatch:
    """Every rank has all experts. With several (`parallel/expert.py`), rank r of `size` has the r-th part of them."""

    rank: int = 0
    size: int = 1

    def __init__(self, sharers: Ranks = ALONE):
        self.sharers = sharers
        """Ranks that have a part of each expert: together they work on the tokens of all of them."""

    def run(self, experts: Experts, x: Tensor, ends: Tensor) -> Tensor:
        """What all experts make of x (M, D), sorted by expert; `ends` (E,) says where each one's tokens end."""
        return experts(x, ends)

    def gather(self, x: Tensor) -> Tensor:
        """Those of all ranks (n N, ...) of x (N, ...), of which each rank goes on with another part."""
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """This rank's part (N, ...) of the sum over ranks of x (n N, ...)."""
        return x

    def read(self, number: Tensor, likely: int) -> int:
        """The value of a 0-dim tensor; `likely`, where tensors have none: that of evenly spread tokens."""
        return int(number)


HERE = Dispatch()


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
