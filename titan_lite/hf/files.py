"""How a model's tensors are called in files, where transformers calls them otherwise once they are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from titan_lite.checkpoint.shard import nbytes
from titan_lite.hf.source import Place, Source, rows


class Files(Protocol):
    """Published names of an architecture's tensors."""

    def published(self, model: Source) -> Source:
        """The tensors as files have them, of those as transformers' modules have them."""
        ...

    def loaded(self, files: Source) -> Source:
        """The opposite; tensors that are stacked in the files already stay as they are."""
        ...


class AsLoaded:
    """The same names in both."""

    def published(self, model: Source) -> Source:
        return model

    def loaded(self, files: Source) -> Source:
        return files


@dataclass(frozen=True)
class PerExpert:
    """Files with matrices of each expert, which transformers stacks to `gate_up_proj` (E, 2F, D) and `down_proj`."""

    branch: str = "mlp"
    """The files' name of the feed-forward branch, which is `mlp` once loaded."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def published(self, model: Source) -> Source:
        return Renamed(self, model)

    def loaded(self, files: Source) -> Source:
        return Stacked(self, files)


@dataclass(frozen=True)
class Part:
    """Rows of one expert's matrix in a stacked tensor."""

    stacked: str
    expert: int
    start: int
    stop: int


STACKED = re.compile(r"(.*\.)mlp\.experts\.(gate_up|down)_proj")


class Renamed:
    """Stacked tensors as matrices of each expert."""

    def __init__(self, names: PerExpert, model: Source):
        self.model = model
        self.meta: Mapping[str, Tensor]
        meta: dict[str, Tensor] = {}
        self._parts: dict[str, Part | str] = {}
        self._last: tuple[str, int, Tensor] | None = None
        for name, tensor in model.meta.items():
            if match := STACKED.fullmatch(name):
                for new, part in _split(names, match, tensor):
                    self._parts[new] = part
                    meta[new] = tensor[part.expert, part.start : part.stop]
            else:
                new = name.replace(".mlp.", f".{names.branch}.")
                self._parts[new] = name
                meta[new] = tensor
        self.meta = meta

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        part = self._parts[name]
        if isinstance(part, str):
            return self.model.read(part, start, stop)
        if self._last is None or self._last[:2] != (part.stacked, part.expert):
            self._last = None
            one = self.model.read(part.stacked, part.expert, part.expert + 1)[0]
            self._last = part.stacked, part.expert, one
        return rows(self._last[2][part.start : part.stop], start, stop)

    def place(self, name: str) -> Place | None:
        part = self._parts[name]
        if isinstance(part, str):
            return self.model.place(part)
        whole = self.model.place(part.stacked)
        if whole is None:
            return None
        before = part.expert * whole.shape[1] + part.start
        start = whole.start + nbytes(whole.dtype, (before, *whole.shape[2:]))
        return Place(whole.path, whole.dtype, (part.stop - part.start, *whole.shape[2:]), start)


def _split(names: PerExpert, match: re.Match[str], tensor: Tensor) -> Iterator[tuple[str, Part]]:
    before, kind = match.groups()
    height = tensor.shape[1]
    halves = {names.gate: (0, height // 2), names.up: (height // 2, height)}
    for expert in range(len(tensor)):
        for matrix, (start, stop) in (halves if kind == "gate_up" else {names.down: (0, height)}).items():
            yield (
                f"{before}{names.branch}.experts.{expert}.{matrix}.weight",
                Part(match.string, expert, start, stop),
            )


class Stacked:
    """Matrices of each expert as stacked tensors."""

    def __init__(self, names: PerExpert, files: Source):
        self.files = files
        self.meta: Mapping[str, Tensor]
        meta: dict[str, Tensor] = {}
        self._renamed: dict[str, str] = {}
        self._experts: dict[str, dict[int, dict[str, str]]] = {}
        one = re.compile(
            rf"(.*\.){re.escape(names.branch)}\.experts\.(\d+)\.({names.gate}|{names.up}|{names.down})\.weight"
        )
        order = {names.gate: 0, names.up: 1, names.down: 0}
        for name, tensor in files.meta.items():
            if match := one.fullmatch(name):
                before, expert, matrix = match.groups()
                whole = f"{before}mlp.experts.{'down' if matrix == names.down else 'gate_up'}_proj"
                self._experts.setdefault(whole, {}).setdefault(int(expert), {})[str(order[matrix])] = name
            else:
                new = name.replace(f".{names.branch}.", ".mlp.")
                self._renamed[new] = name
                meta[new] = tensor
        for whole, experts in self._experts.items():
            for tensor in _stacked_meta(whole, experts, files.meta):
                meta[whole] = tensor
        self.meta = meta

    def place(self, name: str) -> Place | None:
        return self.files.place(self._renamed[name]) if name in self._renamed else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._renamed:
            return self.files.read(self._renamed[name], start, stop)
        experts = self._experts[name]
        stop = len(experts) if stop is None else stop
        each = (_in_order(experts[expert]) for expert in range(start, stop))
        return torch.stack([torch.cat([self.files.read(one) for one in matrices]) for matrices in each])


def _in_order(matrices: Mapping[str, str]) -> list[str]:
    return [matrices[place] for place in sorted(matrices)]


def _stacked_meta(
    whole: str, experts: Mapping[int, Mapping[str, str]], meta: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The stacked tensor; nothing where an expert or one of its matrices is missing, or of another shape."""
    wanted = 2 if whole.endswith("gate_up_proj") else 1
    shapes = {meta[one].shape for matrices in experts.values() for one in matrices.values()}
    complete = sorted(experts) == list(range(len(experts))) and all(len(m) == wanted for m in experts.values())
    if not complete or len(shapes) != 1 or len(next(iter(shapes))) != 2:
        return ()
    height, width = next(iter(shapes))
    like = meta[next(iter(experts[0].values()))]
    return (like.new_empty(len(experts), wanted * height, width),)
