"""What a CUDA caching allocator keeps reserved for a sequence of allocations.

Follows c10/cuda/CUDACachingAllocator.cpp of torch 2.13: sizes in units of 512 bytes; requests up to 1 MiB from segments
of 2 MiB, up to 10 MiB from segments of 20 MiB, larger ones from segments of their own in units of 2 MiB; the smallest
free block that fits is split; neighbours merge when freed; nothing is given back. With expandable segments each pool is
one range that grows in pages of 2 or 20 MiB. Each stream has pools of its own: what FSDP gathers and reduces on others
than that of computation is not there for it. That a block waits for other streams before it is free is not modelled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from estimation.trace import Alloc, Event, Free

MIB = 2**20
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
PAGE = 2 * MIB


class Reserved(NamedTuple):
    """Bytes."""

    live: int
    """Peak of what is allocated."""
    reserved: int
    """Peak of what is held from the device."""


@dataclass
class _Block:
    segment: int
    start: int
    size: int
    free: bool
    before: _Block | None = None
    behind: _Block | None = None


class _Pool:
    """Segments of one kind and their free blocks, smallest first, then lowest address."""

    def __init__(self, small: bool, expandable: bool):
        self.small, self.expandable = small, expandable
        self.free: list[tuple[int, int, int]] = []
        self.blocks: dict[tuple[int, int], _Block] = {}
        self.reserved = 0
        self.segments = 0
        self.last: _Block | None = None
        """The end of the range, with expandable segments."""

    def take(self, size: int) -> _Block:
        index = bisect_left(self.free, (size, -1, -1))
        block = self._unlist(self.free[index]) if index < len(self.free) else self._grow(size)
        block.free = False
        self._split(block, size)
        return block

    def give(self, block: _Block) -> None:
        block.free = True
        for other, behind in ((block.before, False), (block.behind, True)):
            if other is not None and other.free:
                self._unlist((other.size, other.segment, other.start))
                self._merge(block, other, behind)
        self._list(block)

    def _grow(self, size: int) -> _Block:
        if not self.expandable:
            length = self._segment(size)
            block = _Block(self.segments, 0, length, free=True)
            self.segments += 1
            self.reserved += length
            return block
        tail = self.last if self.last is not None and self.last.free else None
        missing = size - (tail.size if tail else 0)
        length = -(-missing // (PAGE if self.small else MIDDLE_SEGMENT)) * (PAGE if self.small else MIDDLE_SEGMENT)
        self.reserved += length
        if tail is not None:
            self._unlist((tail.size, tail.segment, tail.start))
            tail.size += length
            return tail
        start = 0 if self.last is None else self.last.start + self.last.size
        block = _Block(0, start, length, free=True, before=self.last)
        if self.last is not None:
            self.last.behind = block
        self.last = block
        return block

    def _segment(self, size: int) -> int:
        if self.small:
            return SMALL_SEGMENT
        return MIDDLE_SEGMENT if size < MIDDLE else -(-size // PAGE) * PAGE

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest < 512 if self.small or self.expandable else rest <= SMALL:
            return
        new = _Block(block.segment, block.start + size, rest, free=True, before=block, behind=block.behind)
        if block.behind is not None:
            block.behind.before = new
        block.behind, block.size = new, size
        if self.last is block:
            self.last = new
        self._list(new)

    def _merge(self, block: _Block, other: _Block, behind: bool) -> None:
        block.size += other.size
        if behind:
            block.behind = other.behind
            if other.behind is not None:
                other.behind.before = block
        else:
            block.start, block.before = other.start, other.before
            if other.before is not None:
                other.before.behind = block
        if self.last is other:
            self.last = block

    def _list(self, block: _Block) -> None:
        insort(self.free, (block.size, block.segment, block.start))
        self.blocks[block.segment, block.start] = block

    def _unlist(self, entry: tuple[int, int, int]) -> _Block:
        del self.free[bisect_left(self.free, entry)]
        return self.blocks.pop(entry[1:])


def replay(events: Iterable[Event], expandable: bool = False) -> Reserved:
    """Peaks of what the events allocate and of what an allocator reserves for them."""
    pools: dict[tuple[int, bool], _Pool] = {}
    held: dict[int, tuple[_Pool, _Block, int]] = {}
    live = peak = reserved = 0
    for event in events:
        if isinstance(event, Alloc):
            key = (event.stream, event.nbytes <= SMALL)
            pool = pools.setdefault(key, _Pool(key[1], expandable))
            held[event.storage] = (pool, pool.take(event.nbytes), event.nbytes)
            live += event.nbytes
            peak = max(peak, live)
            reserved = max(reserved, sum(pool.reserved for pool in pools.values()))
        elif isinstance(event, Free) and event.storage in held:
            pool, block, nbytes = held.pop(event.storage)
            pool.give(block)
            live -= nbytes
    return Reserved(peak, reserved)
