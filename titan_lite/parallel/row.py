"""The tokens of each row over the ranks of the `cp` axis: who has which, and how all of them come together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_lite.models.row import Row
from titan_lite.parallel.deal import DEALS, LoadBalancer

ops = torch.ops._c10d_functional


class SplitRow(Row):
    """A row's tokens, in equal chunks, on the ranks of an axis. Collectives are functional ones: a compiled block has
    them in its graph."""

    def __init__(self, mesh: DeviceMesh, balancer: LoadBalancer):
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.group = mesh.get_group().group_name
        self.chunks = [DEALS[balancer](rank, self.size) for rank in range(self.size)]
        """Numbers of each rank's chunks."""
        self.n_chunks = sum(map(len, self.chunks))

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        return self.dealt(x, dim)[self.rank]

    def dealt(self, x: Tensor, dim: int) -> list[Tensor]:
        """What each rank has of all tokens x."""
        pieces = x.chunk(self.n_chunks, dim)
        assert len(pieces) == self.n_chunks, f"{x.shape[dim]} tokens are not {self.n_chunks} equal chunks"
        return [torch.cat([pieces[number] for number in numbers], dim) for numbers in self.chunks]

    def in_order(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """All tokens, of what each rank has: the inverse of `dealt`."""
        pieces: dict[int, Tensor] = {}
        for numbers, part in zip(self.chunks, parts, strict=True):
            pieces |= zip(numbers, part.chunk(len(numbers), dim), strict=True)
        return torch.cat([pieces[number] for number in range(self.n_chunks)], dim)

    def whole(self, x: Tensor) -> Tensor:
        return self.in_order(ops.wait_tensor(self.gathering(x)).chunk(self.size), dim=1)

    def gathering(self, x: Tensor) -> Tensor:
        """Of x (B, ...) those of all ranks (n B, ...), which are still under way: to be waited for."""
        return ops.all_gather_into_tensor(x.contiguous(), self.size, self.group)

    def summing(self, parts: Sequence[Tensor]) -> Tensor:
        """Of one x (B, ...) for each rank the sum of all that are for this one; still under way."""
        return ops.reduce_scatter_tensor(torch.cat(list(parts)), "sum", self.size, self.group)

    def passing(self, x: Tensor) -> Tensor:
        """x of the rank before this one, flat, where each rank sends its own to the one behind; still under way."""
        flat = x.contiguous().view(-1)
        sent, received = [0] * self.size, [0] * self.size
        sent[(self.rank + 1) % self.size] = received[(self.rank - 1) % self.size] = flat.numel()
        return ops.all_to_all_single(flat, received, sent, self.group)

    def exchanged(self, x: Tensor) -> Tensor:
        """x (n, ...) with a part for each rank -> (n, ...) with one of each rank."""
        even = [1] * self.size
        return ops.wait_tensor(ops.all_to_all_single(x.contiguous(), even, even, self.group))

    def sum(self, x: Tensor) -> Tensor:
        return ops.wait_tensor(ops.all_reduce(x.detach().contiguous(), "sum", self.group))
