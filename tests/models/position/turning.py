"""Position encodings by themselves, on queries and keys of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_lite.models.context import Context, Memory, NoMemory
from titan_lite.models.position import Position
from titan_lite.models.row import WHOLE
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
"""fp32, numbers of size 1."""


def position(head_dim: int = 16, n_heads: int = 4, **table: Any) -> Position:
    """A position encoding of the table's `type`."""
    module: Position = Position.Config.choose(table).build(n_heads=n_heads, head_dim=head_dim)
    specs = collect_specs(module)
    for name, parameter in module.named_parameters():
        torch.nn.init.constant_(parameter, float(specs[name].start))
    return module


class Zeros(NoMemory):
    """The memory of `length` tokens whose keys and values are 0."""

    def __init__(self, length: int):
        self.length = length

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = k.new_zeros(*k.shape[:2], self.length, k.shape[3])
        return torch.cat((before, k), dim=2), torch.cat((before, v), dim=2)


def context_of(memory: Memory, length: int) -> Context:
    """What positions read of the context of a forward over `length` more tokens."""
    nothing = Context._make([None] * len(Context._fields))
    return nothing._replace(row=WHOLE, positions=torch.arange(memory.length, memory.length + length), memory=memory)


def context(length: int, start: int = 0) -> Context:
    """That of a forward over `length` tokens with `start` others before them."""
    return context_of(Zeros(start), length)


def turned(module: Position, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys with their positions, of which the first is `start`."""
    told = context(q.shape[2], start)
    q, k, _ = module(q, k, k, told.memory, module.prepare(told))
    return q, k[:, :, start:]


def scores(module: Position, q: Tensor, k: Tensor, start: int = 0) -> Tensor:
    """q k^T (B, H, T, T) after positions."""
    q, k = turned(module, q, k, start)
    return q @ k.transpose(-1, -2)


def queries_and_keys(length: int = 12, head_dim: int = 16, n_heads: int = 4) -> tuple[Tensor, Tensor]:
    """Two draws from N(0, 1), (2, H, T, Dh)."""
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 2, n_heads, length, head_dim, generator=generator)
    return q, k
