"""Decoding of one text with the memory that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titan_lite.models.context import Memory
from titan_lite.models.memory.xl import KeptKeys, Recalled

if TYPE_CHECKING:
    from titan_lite.models.memory.long_term import LongTermMemory


class Decoding(Memory):
    """A segment that grows by each call's tokens behind what its memory shows; when it is full, the next one begins."""

    grows = True
    plain_keys = True

    def __init__(self, memory: LongTermMemory, seq_len: int):
        self.memory, self.seq_len = memory, seq_len
        self.recalled = memory.recalled
        self._begin()

    def _begin(self) -> None:
        self.length, self.room = self.memory.length, self.seq_len
        self.layers: dict[int, KeptKeys] = {}
        self.seen: list[Tensor] = []

    def layer(self, index: int) -> Recalled:  # type: ignore[override]  # a tuple has no other bases
        shown = self.memory.layer(index)
        return Recalled(shown.joined(), self.layers[index]) if index in self.layers else shown

    def first_key(self, documents: Tensor | None) -> Tensor | None:
        return self.memory.first_key(documents)

    def keep(self, index: int, carry: dict[str, Tensor]) -> None:
        new = KeptKeys(carry.pop("memory.k"), carry.pop("memory.v"))
        self.layers[index] = new.behind(self.layers[index]) if index in self.layers else new

    def see(self, x: Tensor) -> None:
        self.seen.append(x)

    def advance(self, tokens: int) -> None:
        """Counts `tokens` as seen, at most `room`; call after each forward."""
        self.length, self.room = self.length + tokens, self.room - tokens
        if self.room:
            return
        for index, kept in self.layers.items():
            self.memory.keep(index, {"memory.k": kept.k, "memory.v": kept.v})
        x = torch.cat(self.seen, dim=1)
        self.memory.see(x)
        self.memory.advance(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
        self.memory.recall()
        self._begin()
