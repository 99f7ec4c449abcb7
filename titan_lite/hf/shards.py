"""Safetensors files, written piece by piece from a source."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from titan_lite.checkpoint.shard import DTYPE_CODES, as_bytes, nbytes
from titan_lite.config.errors import ConfigError
from titan_lite.hf.growing_file import COPIES, PAGE, GrowingFile
from titan_lite.hf.source import Place, Source, pieces
from titan_lite.hf.stored import INDEX, ONE_FILE

UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number, as transformers reads them. ValueError otherwise."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or int(match[1]) == 0:
        raise ValueError(f"{text!r} is no size")
    return int(match[1]) * UNITS[match[2].upper()]


@dataclass(frozen=True)
class Written:
    """What a folder's weights came to."""

    files: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    largest_file: int


def write_shards(folder: Path, source: Source, dtype: torch.dtype, limit: int) -> Written:
    """Writes all tensors to files of at most `limit` bytes, or one tensor, and an index where they are several."""
    types = {name: dtype if meta.is_floating_point() else meta.dtype for name, meta in source.meta.items()}
    sizes = {name: nbytes(types[name], tuple(meta.shape)) for name, meta in source.meta.items()}
    groups = _groups(sizes, limit)
    names = [ONE_FILE] if len(groups) == 1 else [_file(i, len(groups)) for i in range(len(groups))]
    closing: Future[None] | None = None
    for file, group in zip(names, groups, strict=True):
        _, durable = write_file(folder / file, source, {name: types[name] for name in group})
        if closing is not None:  # while the next one was written
            closing.result()
        closing = durable
    assert closing is not None
    closing.result()
    total, parameters = sum(sizes.values()), sum(meta.numel() for meta in source.meta.values())
    if len(groups) > 1:
        weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    largest = max(sum(sizes[name] for name in group) for group in groups)
    return Written(tuple(names), len(sizes), parameters, total, largest)


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _file(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_file(
    path: Path, source: Source, types: Mapping[str, torch.dtype], see: Callable[[memoryview], None] | None = None
) -> tuple[dict[str, int], Future[None]]:
    """Writes the named tensors in these types to the new file; returns where each one's values begin, and what waits
    until they are durable.

    `see` gets all that is written, in order, for a checksum.
    """
    copied = _copied(source, types) if COPIES and see is None else {}
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in _order(types, copied):
        shape = tuple(source.meta[name].shape)
        begins[name], end = end, end + nbytes(types[name], shape)
        offsets = [begins[name], end]
        table[name] = {"dtype": DTYPE_CODES[types[name]], "shape": list(shape), "data_offsets": offsets}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * ((_shift(begins, copied) - 8 - len(head)) % PAGE)
    head = len(head).to_bytes(8, "little") + head
    with GrowingFile(path, see) as file:
        file.write(memoryview(head))
        for name in begins:
            if name in copied:
                file.copy(copied[name])
            else:
                _append(file, source, name, types[name])
    return {name: len(head) + begin for name, begin in begins.items()}, file.durable


def _copied(source: Source, types: Mapping[str, torch.dtype]) -> dict[str, Place]:
    """Where the tensors are whose bytes stay as they are."""
    places = ((name, source.place(name)) for name in types)
    return {name: place for name, place in places if place is not None and place.dtype == types[name]}


def _order(types: Mapping[str, torch.dtype], copied: Mapping[str, Place]) -> list[str]:
    """Copies in the order of their files, before the others; and larger types first, so that each is aligned to its."""
    copies = sorted(copied, key=lambda name: (copied[name].path, copied[name].start))
    names = [*copies, *(name for name in types if name not in copied)]
    return sorted(names, key=lambda name: -types[name].itemsize)


def _shift(begins: Mapping[str, int], copied: Mapping[str, Place]) -> int:
    """Where in a page the first tensor is to begin, so that most bytes keep their place in one."""
    counts: Counter[int] = Counter()
    for name, place in copied.items():
        counts[(place.start - begins[name]) % PAGE] += place.nbytes
    aligned = [shift for shift, _ in counts.most_common() if shift % 8 == 0]  # safetensors wants to begin there
    return aligned[0] if aligned else 0


def _append(file: GrowingFile, source: Source, name: str, dtype: torch.dtype) -> None:
    for start, stop in pieces(source.meta[name]):
        values = source.read(name, start, stop)
        typed = values.to(dtype).contiguous()
        if typed.dtype != values.dtype and not typed.isfinite().all():
            raise ConfigError.at(name, f"has values that no {str(dtype).removeprefix('torch.')} can be")
        file.write(as_bytes(typed))


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole and makes it durable."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole and makes it durable."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def common_dtype(metas: Sequence[Tensor]) -> torch.dtype:
    """The type that most numbers of a model have."""
    counts: dict[torch.dtype, int] = {}
    for meta in metas:
        if meta.is_floating_point():
            counts[meta.dtype] = counts.get(meta.dtype, 0) + meta.numel()
    return max(counts, key=lambda dtype: counts[dtype])
