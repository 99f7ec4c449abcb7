"""Tensors in files: a step folder of ours, a Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from titan_lite.checkpoint.folder import refuse
from titan_lite.checkpoint.index import Chunk, Index
from titan_lite.checkpoint.manifest import open_regular
from titan_lite.checkpoint.reader import read_block
from titan_lite.checkpoint.shard import DTYPES, nbytes
from titan_lite.config.errors import BAD_INPUT, FILE_MISSING, ConfigError
from titan_lite.hf.source import Place

ONE_FILE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_HEADER: Final = 100 * 2**20
"""Bytes; the limit of the safetensors library."""
PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


class StepTensors:
    """The weights in a step folder whose files have been verified, under the names that the model gives them."""

    def __init__(self, folder: Path, index: Index):
        self.folder = folder
        self.index = {name.removeprefix("model."): at for name, at in index.items() if name.startswith("model.")}
        self.meta: Mapping[str, Tensor] = {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in self.index.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        stored = self.index[name]
        length = stored.shape[0] if stored.shape else 1
        stop = length if stop is None else min(stop, length)
        target = torch.empty((stop - start, *stored.shape[1:]) if stored.shape else (), dtype=stored.dtype)
        for chunk in stored.chunks:
            self._read_chunk(chunk, stored.dtype, start, stop, target)
        return target

    def place(self, name: str) -> Place | None:
        stored = self.index[name]
        if len(stored.chunks) > 1:
            return None
        (chunk,) = stored.chunks
        return Place(self.folder / chunk.file, stored.dtype, stored.shape, chunk.start)

    def _read_chunk(self, chunk: Chunk, dtype: torch.dtype, start: int, stop: int, target: Tensor) -> None:
        """The part of a chunk that lies in the rows [start, stop) of its tensor."""
        region = [(0, size) for size in chunk.shape]
        if chunk.shape:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.shape[0])
            if first >= last:
                return
            region[0] = (first - chunk.offsets[0], last - first)
            target = target[first - start : last - start]
            for dim, (at, size) in enumerate(zip(chunk.offsets[1:], chunk.shape[1:], strict=True), start=1):
                target = target.narrow(dim, at, size)
        path = self.folder / chunk.file
        try:
            with open_regular(path) as file:
                read_block(file, chunk.start, chunk.shape, dtype, region, target)
        except OSError as error:
            raise refuse(path, f"the tensors cannot be read: {error.strerror}") from None


class FolderTensors:
    """The weights of a Hugging Face folder. ConfigError names the file, and the tensor, where something is wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places = dict(self._places())
        self.meta: Mapping[str, Tensor] = {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta") for name, place in self.places.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        place = self.places[name]
        length = place.shape[0] if place.shape else 1
        stop = length if stop is None else min(stop, length)
        target = torch.empty((stop - start, *place.shape[1:]) if place.shape else (), dtype=place.dtype)
        region = [(0, size) for size in place.shape]
        if region:
            region[0] = (start, stop - start)
        try:
            with open_file(place.path) as file:
                read_block(file, place.start, place.shape, place.dtype, region, target)
        except OSError as error:
            raise damaged(place.path, f"{name} cannot be read: {error.strerror}") from None
        wide = target.float() if place.dtype.itemsize == 1 else target
        if place.dtype.is_floating_point and not wide.isfinite().all():
            raise damaged(place.path, f"{name} holds values that are no finite numbers")
        return target

    def place(self, name: str) -> Place | None:
        return None  # it is no step folder

    def _places(self) -> Iterator[tuple[str, Place]]:
        if (self.folder / INDEX).is_file():
            yield from self._indexed(_weight_map(self.folder / INDEX))
        elif (self.folder / ONE_FILE).is_file():
            yield from header(self.folder / ONE_FILE).items()
        else:
            why = f"there is no {ONE_FILE} and no {INDEX} in it"
            if found := [name for name in PICKLED if (self.folder / name).exists()]:
                why += f"; {found[0]} is a pickle, which is never read: save the model again as safetensors"
            raise ConfigError.at(str(self.folder), why, code=FILE_MISSING)

    def _indexed(self, weight_map: dict[str, str]) -> Iterator[tuple[str, Place]]:
        headers = {file: header(self.folder / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise damaged(self.folder / file, f"{name} is not in it, where {INDEX} has it")
            yield name, headers[file][name]
        for file, found in headers.items():
            if extra := sorted(name for name in found if weight_map.get(name) != file):
                raise damaged(self.folder / file, f"{extra[0]} is in it, and {INDEX} does not say so")


def damaged(path: Path, why: str) -> ConfigError:
    return ConfigError.at(str(path), why, code=BAD_INPUT)


def open_file(path: Path) -> BinaryIO:
    """A file of a Hugging Face folder; links are followed, of which the hub's cache is made."""
    return open(path, "rb", buffering=0)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table. Raises ConfigError naming the file."""
    try:
        table = json.loads(path.read_bytes())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = "the file is missing" if missing else f"cannot be read: {error.strerror}"
        raise ConfigError.at(str(path), why, code=FILE_MISSING) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON: {str(error)[:300]}") from None
    if not isinstance(table, dict):
        raise damaged(path, "does not hold a table")
    return table


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise damaged(path, "has no table weight_map")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise damaged(path, f"has {name} in {file!r}, which is no safetensors file of this folder")
    return found


def header(path: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file are; nothing in it is trusted."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise damaged(path, f"is no safetensors file, or was cut off: it has {size} bytes")
            table = json.loads(file.read(length))
        return dict(_place(path, name, entry, 8 + length, size) for name, entry in _entries(table, size - 8 - length))
    except FileNotFoundError:
        raise ConfigError.at(str(path), f"the file is missing, which {INDEX} names", code=FILE_MISSING) from None
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its safetensors header is damaged: {str(error)[:300] or type(error).__name__}") from None


def _entries(table: dict[str, Any], size: int) -> list[tuple[str, Any]]:
    """The header's entries, which together take all the bytes behind it."""
    entries = [(name, entry) for name, entry in table.items() if name != "__metadata__"]
    end = 0
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != end or stop < begin:
            raise ValueError(f"{name} begins at byte {begin}, where {end} is expected")
        end = stop
    if end != size:
        raise ValueError(f"the tensors take {end} bytes, and the file has {size} for them")
    return entries


def _place(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> tuple[str, Place]:
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise ValueError(f"{name} has the type {entry['dtype']!r}, which is not known here")
    begin, end = entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in shape) or end - begin != nbytes(dtype, shape):
        raise ValueError(f"{name} of shape {list(shape)} has {end - begin} bytes")
    return name, Place(path, dtype, shape, base + begin)
