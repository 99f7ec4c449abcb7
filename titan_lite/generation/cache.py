"""Keys and values of the text so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_lite.models.context import LayerMemory, Memory


class LayerCache(LayerMemory):
    """One layer's keys and values, (B, G, capacity, Dh), filled up to `cache.length`."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.k = self.v = torch.empty(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes behind what is there and returns everything written so far."""
        if not self.k.numel():
            self.k = k.new_empty(*k.shape[:2], self.cache.capacity, k.shape[3])
            self.v = v.new_empty(*v.shape[:2], self.cache.capacity, v.shape[3])
        start, stop = self.cache.length, self.cache.length + k.shape[2]
        assert stop <= self.cache.capacity, f"{stop} tokens in a cache for {self.cache.capacity}"
        self.k.narrow(2, start, stop - start).copy_(k)
        self.v.narrow(2, start, stop - start).copy_(v)
        return self.k.narrow(2, 0, stop), self.v.narrow(2, 0, stop)

    def take(self, other: LayerCache, tokens: int) -> None:
        """Writes what this call's `tokens` tokens have written into `other`."""
        written = slice(self.cache.length, self.cache.length + tokens)
        self.extend(other.k[:, :, written], other.v[:, :, written])

    def select(self, rows: Tensor) -> None:
        """See `KVCache.select`."""
        self.k, self.v = self._selected(self.k, rows), self._selected(self.v, rows)

    def _selected(self, x: Tensor, rows: Tensor) -> Tensor:
        """Only what is filled is copied."""
        out = x.new_empty(len(rows), *x.shape[1:])
        filled = slice(0, self.cache.length)
        out[:, :, filled] = x[:, :, filled].index_select(0, rows)
        return out


class KVCache(Memory):
    """Keys and values of every executed layer, for up to `capacity` tokens."""

    grows = True

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        return self.layers.setdefault(index, LayerCache(self))

    @property
    def room(self) -> int:
        """Tokens that the next call may have."""
        return self.capacity - self.length

    def advance(self, tokens: int) -> None:
        """Counts `tokens` as seen; call after each forward."""
        self.length += tokens

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was: of rows some may leave, and some may be repeated."""
        filled = [layer for layer in self.layers.values() if layer.k.numel()]
        if not filled or list(rows) == list(range(filled[0].k.shape[0])):
            return
        index = torch.tensor(rows, device=filled[0].k.device)
        for layer in filled:
            layer.select(index)
