"""Tensors that are read when they are asked for, and what rules make of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from titan_lite.checkpoint.shard import nbytes
from titan_lite.hf.rule import SAME, Rule, Tensors

PIECE = 2**20
"""Bytes that are read, changed and written at a time where a tensor can be done in pieces: they stay in the cache, and
the allocator reuses them, where larger ones would be new pages each time."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's values are."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Bytes from the beginning of the file."""

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


class Source(Protocol):
    """Tensors by name; what is held in memory is one that is being read, at most."""

    @property
    def meta(self) -> Mapping[str, Tensor]:
        """All of them on the meta device: shapes and types."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its entries [start, stop) along the first dim. Raises ConfigError naming what is damaged."""
        ...

    def place(self, name: str) -> Place | None:
        """Where the tensor is in a step folder, just so and in one piece; None where it has to be read."""
        ...


class InMemory:
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.meta: Mapping[str, Tensor] = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return rows(self.tensors[name].detach(), start, stop)

    def place(self, name: str) -> Place | None:
        return None


class Meta:
    """Tensors that only have shapes."""

    def __init__(self, meta: Mapping[str, Tensor]):
        self.meta = meta

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        raise NotImplementedError("there are no values")

    def place(self, name: str) -> Place | None:
        return None


class Image:
    """What rules make of a source's tensors. KeyError for a rule that asks for one that is not there."""

    def __init__(self, rules: Iterable[Rule], source: Source):
        self.source = source
        self.meta: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Rule, int]] = {}
        self._last: tuple[Rule, Tensors] | None = None
        with torch.device("meta"):
            for rule in rules:
                made = rule.transform.to_hf(tuple(source.meta[name] for name in rule.ours))
                for place, (name, tensor) in enumerate(zip(rule.theirs, made, strict=True)):
                    self.meta[name] = tensor
                    self._places[name] = rule, place

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        rule, place = self._places[name]
        if rule.transform is SAME:
            return self.source.read(rule.ours[place], start, stop)
        if self._in_pieces(rule):
            split = len(rule.ours) - rule.transform.whole
            parts = [self.source.read(one, start, stop) for one in rule.ours[:split]]
            parts += [self.source.read(one) for one in rule.ours[split:]]
            return rule.transform.to_hf(tuple(parts))[place]
        if self._last is None or self._last[0] is not rule:
            self._last = None  # before the next ones are made, not after
            self._last = rule, rule.transform.to_hf(tuple(self.source.read(one) for one in rule.ours))
        return rows(self._last[1][place], start, stop)

    def place(self, name: str) -> Place | None:
        rule, place = self._places[name]
        return self.source.place(rule.ours[place]) if rule.transform is SAME else None

    def _in_pieces(self, rule: Rule) -> bool:
        by_rows = rule.ours[: len(rule.ours) - rule.transform.whole]
        shapes = [self.source.meta[name].shape for name in by_rows] + [self.meta[name].shape for name in rule.theirs]
        return bool(rule.transform.rowwise and by_rows) and len({shape[:1] for shape in shapes}) == 1


def chosen(source: Source, names: Iterable[str], copies: Mapping[str, str] | None = None) -> Image:
    """Those of a source's tensors, and of some of them copies: the tensor's name by that of the copy."""
    places = {name: name for name in names} | dict(copies or {})
    return Image([Rule((one,), (name,)) for name, one in places.items()], source)


def rows(tensor: Tensor, start: int, stop: int | None) -> Tensor:
    """Entries [start, stop) along the first dim; a tensor without dims as it is."""
    return tensor[start:stop] if tensor.dim() else tensor


def pieces(meta: Tensor, size: int = PIECE) -> Sequence[tuple[int, int]]:
    """(start, stop) along the first dim, of at most `size` bytes where an entry is no larger."""
    if not meta.dim() or not meta.numel():
        return [(0, len(meta) if meta.dim() else 1)]
    step = max(1, size // (meta.nbytes // len(meta)))
    return [(start, min(start + step, len(meta))) for start in range(0, len(meta), step)]
