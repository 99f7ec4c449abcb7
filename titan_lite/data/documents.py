"""The order of documents: which are held out, which group of lanes reads which shards when.

The S shards are shared out among K = min(S, G) groups, G being the rows of the global batch. In every epoch a group
reads the shards of one of K classes, and in K epochs each class once: every group meets every shard equally often,
whatever their sizes. All of it is a function of (data config, seed, G), so that no rank has to know what another one
reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from titan_lite.data.source import Keep, Source

BLOCK_DOCUMENTS = 256
BLOCK_CHARACTERS = 1 << 22
"""A block ends with the document that reaches either limit: bounds what shuffling inside a shard holds in memory."""


class Place(NamedTuple):
    """Where reading can start again: the first row of a block."""

    epoch: int
    position: int
    """Which of the group's shards of this epoch."""
    block: int
    """The block's first row in the shard."""
    ordinal: int
    """Number of documents the group has read before, over all epochs."""


START = Place(0, 0, 0, 0)


class Document(NamedTuple):
    """A training document; `ordinal` counts the group's documents on over epochs and decides whose lane it is."""

    text: str
    ordinal: int
    place: Place


@dataclass(frozen=True)
class Split:
    """The training or the held-out documents of a source."""

    source: Source
    fraction: float
    """Of the documents that are held out."""
    held_out: bool

    def keep(self, shard: str) -> Keep:
        """Says of a row of `shard` whether its document is in this split."""
        prefix = f"{self.source.identity}\0{shard}\0"
        limit = int(self.fraction * 2**64)
        return lambda row: (xxhash.xxh3_64_intdigest(f"{prefix}{row}".encode()) < limit) == self.held_out

    def documents(self) -> Iterator[str]:
        """Every document once, in canonical order."""
        for shard in self.source.shards():
            for _, text in self.source.read(shard, 0, self.keep(shard)):
                yield text

    def require_documents(self) -> None:
        """Raises ConfigError if there is not one document: training would look for one for ever."""
        if next(self.documents(), None) is None:
            kind = "held out for validation" if self.held_out else "to train on"
            dropped = f"; {self.source.dropped:,} are empty or cannot be decoded" if self.source.dropped else ""
            held = f"; data.held_out = {self.fraction:g} by a hash of each document's place" if self.fraction else ""
            raise self.source.error(f"{self.source.describe()}: no document {kind}{dropped}{held}")
        self.source.dropped = 0  # reading proper begins now


@dataclass(frozen=True)
class Group:
    """The k-th of K groups and its endless stream of documents."""

    split: Split
    shards: tuple[str, ...]
    k: int
    n_groups: int
    seed: int
    shuffle: bool

    def order(self, epoch: int) -> list[int]:
        """Indices of the shards this group reads in an epoch, in reading order."""
        cycle, turn = divmod(epoch, self.n_groups)
        first = (self.k + turn) % self.n_groups
        if not self.shuffle:
            return list(range(first, len(self.shards), self.n_groups))
        mine = permutation(len(self.shards), f"owner {self.seed} {cycle}")[first :: self.n_groups]
        return mine[permutation(len(mine), f"order {self.seed} {epoch} {self.k}")].tolist()

    def documents(self, start: Place) -> Iterator[Document]:
        """The group's documents from the block at `start` on, without end."""
        epoch, position, block, ordinal = start
        seen_in = epoch
        while epoch - seen_in < 2 * self.n_groups:  # that many epochs cover every shard
            shards = self.order(epoch)
            while position < len(shards):
                for first_row, texts in self._blocks(shards[position], block):
                    place = Place(epoch, position, first_row, ordinal)
                    for i in self._block_order(len(texts), epoch, shards[position], first_row):
                        seen_in = epoch
                        yield Document(texts[i], ordinal, place)
                        ordinal += 1
                position += 1
                block = 0
            position = 0
            epoch += 1
        raise self.split.source.error(
            f"{self.split.source.describe()}: no document is left to train on; has the data changed?"
        )

    def _blocks(self, index: int, start: int) -> Iterator[tuple[int, list[str]]]:
        """(first row, texts) of the shard's blocks from row `start` on; `start` is the first row of a block."""
        shard = self.shards[index]
        texts: list[str] = []
        characters = 0
        for row, text in self.split.source.read(shard, start, self.split.keep(shard)):
            texts.append(text)
            characters += len(text)
            if len(texts) == BLOCK_DOCUMENTS or characters >= BLOCK_CHARACTERS:
                yield start, texts
                texts, characters, start = [], 0, row + 1
        if texts:
            yield start, texts

    def _block_order(self, n: int, epoch: int, index: int, first_row: int) -> list[int]:
        if not self.shuffle or n == 1:
            return list(range(n))
        return permutation(n, f"block {self.seed} {epoch} {self.shards[index]} {first_row}").tolist()


@lru_cache(maxsize=4)
def permutation(n: int, key: str) -> npt.NDArray[np.int64]:
    """A random order of range(n) from nothing but `key` and n: a library's generator may change with its version.

    Sorts by splitmix64. Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators (2014).
    """
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        xxhash.xxh3_64_intdigest(key.encode())
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
