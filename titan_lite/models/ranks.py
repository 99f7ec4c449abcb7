"""The tensor-parallel ranks that share a model, as its modules see them. Alone, none of this is an operation."""

from __future__ import annotations

from torch import Tensor


class Ranks:
    """One rank alone. With several (`parallel/tensor.py`), each has heads and features of its own, and in training also
    tokens of its own: the residual stream is (B, T / n, D). Outside training, where nothing is kept for a backward,
    every rank has the whole stream, so that a single token can be decoded.
    """

    rank: int = 0
    size: int = 1

    def gather(self, x: Tensor, training: bool) -> Tensor:
        """All tokens (B, T, ...) of the stream's x."""
        return x

    def reduce(self, x: Tensor, training: bool) -> Tensor:
        """The sum over ranks of x (B, T, ...), as part of the stream."""
        return x

    def own(self, x: Tensor, training: bool) -> Tensor:
        """What belongs to the stream's tokens, of x (T, ...)."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, of which each rank makes something else."""
        return x

    def sum_alike(self, x: Tensor) -> Tensor:
        """The sum over ranks, of which every rank makes the same."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks. Without a gradient."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """The ranks' parts of the last dimension together, of which every rank makes the same."""
        return x


ALONE = Ranks()
