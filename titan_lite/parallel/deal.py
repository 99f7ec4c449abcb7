"""How a row's tokens are dealt to context-parallel ranks, and what does not go with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

LoadBalancer: TypeAlias = Literal["headtail", "none"]
RotateMethod: TypeAlias = Literal["allgather", "alltoall"]


def head_and_tail(rank: int, size: int) -> tuple[int, ...]:
    """Of 2 * size chunks one from the front and one from the back: a causal mask leaves all ranks as many scores."""
    return rank, 2 * size - 1 - rank


def in_a_row(rank: int, size: int) -> tuple[int, ...]:
    """Of `size` chunks the next one: under a causal mask the last rank has the most to do."""
    return (rank,)


DEALS: dict[LoadBalancer, Callable[[int, int], tuple[int, ...]]] = {"headtail": head_and_tail, "none": in_a_row}
"""From a rank and the number of ranks to the numbers of its chunks of a row, which ascend."""
