"""Which tokens of a long text are read for which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens [start, stop - 1) of a text are read, and those of [first, stop) are predicted."""

    start: int
    first: int
    stop: int


def windows(n: int, size: int, stride: int) -> Iterator[Window]:
    """Windows in which each of the tokens 1 .. n - 1 is predicted once, from at most `size` tokens before it.

    The first one predicts `size` tokens, every other the next `stride`, of which the first sees size - stride + 1
    tokens and the last sees `size`.
    """
    assert 1 <= stride <= size, f"a stride of {stride} in windows of {size}"
    first, stop = 1, min(n, size + 1)
    while first < n:
        yield Window(max(0, stop - 1 - size), first, stop)
        first, stop = stop, min(n, stop + stride)
