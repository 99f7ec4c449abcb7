"""The ranks that share the tokens of each row, as a model sees them. Alone, none of this is an operation."""

from __future__ import annotations

from torch import Tensor


class Row:
    """All tokens on one rank. With several ranks (`parallel/row.py`) each has as many of them, in the row's order: what
    is said of a token stays on its rank, and attention alone meets those of the others.
    """

    rank: int = 0
    size: int = 1

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of x, in which dimension `dim` is that of the row's."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens (B, T, ...) of the row, of which each rank has x."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks. Without a gradient."""
        return x


WHOLE = Row()
