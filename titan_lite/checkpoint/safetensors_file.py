"""Writes one safetensors file as a stream, hashing what is written.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length; a JSON header
`{key: {"dtype", "shape", "data_offsets": [begin, end]}}`, padded with spaces to 8 bytes; the raw values without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from titan_lite.checkpoint.manifest import FileSum
from titan_lite.checkpoint.shard import DTYPE_CODES, as_bytes, nbytes

PIECE = 4 * 2**20  # bytes hashed and written at a time: stays in the cache between the two


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `value` is asked for when its turn comes, so that only one is on the host at a time."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


@dataclass(frozen=True)
class Written:
    """A finished file, and where each key's values begin, in bytes from the start of the file."""

    sum: FileSum
    starts: dict[str, int]


class HashingFile:
    """A new file whose content is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()
        self.hash = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for begin in range(0, len(view), PIECE):
            piece = view[begin : begin + PIECE]
            self.hash.update(piece)
            while piece:  # the kernel may take less than it was given
                piece = piece[self.file.write(piece) :]
        self.size += len(view)

    def sum(self) -> FileSum:
        return FileSum(size=self.size, xxh3_128=self.hash.hexdigest())

    def close(self) -> None:
        """Makes the content durable."""
        try:
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def write_file(path: Path, data: bytes) -> FileSum:
    """Writes a small file whole and makes it durable."""
    file = HashingFile(path)
    try:
        file.write(data)
    finally:
        file.close()
    return file.sum()


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> Written:
    """Writes `entries` to the new file `path`, durably. Widest dtypes first: every tensor is aligned to its dtype."""
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, object] = {"__metadata__": metadata}
    begins: dict[str, int] = {}
    end = 0
    for entry in entries:
        begins[entry.key], end = end, end + nbytes(entry.dtype, entry.shape)
        header[entry.key] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begins[entry.key], end],
        }
    assert len(begins) == len(entries), "two tensors of one file have the same key"
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file = HashingFile(path)
    try:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in entries:
            value = entry.value()
            assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape), entry.key
            file.write(as_bytes(value.detach().cpu().contiguous()))
    finally:
        file.close()
    base = 8 + len(head)
    return Written(file.sum(), {key: base + begin for key, begin in begins.items()})
