"""`metadata.json`: which tensor is in which bytes of which file. Stands for DCP's pickled `.metadata`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_lite.checkpoint.folder import refuse
from titan_lite.checkpoint.shard import DTYPE_CODES, DTYPES, nbytes

INDEX = "metadata.json"
SHARD_FILE = re.compile(r"shard-\d{5,}\.safetensors")
FORMAT = 1


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, row-major in `file` from byte `start`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Index = dict[str, StoredTensor]


def shard_file(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def chunk_key(name: str, offsets: tuple[int, ...], whole: bool) -> str:
    """The key of a chunk in its safetensors file: the tensor's own name if the chunk is all of it."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


def index_to_json(index: Index) -> bytes:
    tensors = {
        name: {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "chunks": [
                {"offsets": chunk.offsets, "shape": chunk.shape, "file": chunk.file, "start": chunk.start}
                for chunk in tensor.chunks
            ],
        }
        for name, tensor in sorted(index.items())
    }
    return json.dumps({"format": FORMAT, "tensors": tensors}, separators=(",", ":")).encode()


def index_from_json(data: bytes, path: Path, file_sizes: Mapping[str, int]) -> Index:
    """Reads `metadata.json` (from `path`), trusting nothing. Raises ConfigError.

    Files must be the manifest's, bytes must lie inside them, chunks inside their tensor and together be as large as it.
    """
    try:
        document = json.loads(data)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r} is not known to this version")
        return {name: _tensor(value, file_sizes) for name, value in document["tensors"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise refuse(path, f"the tensor index is damaged: {what[:500]}") from None


def _tensor(value: dict[str, Any], file_sizes: Mapping[str, int]) -> StoredTensor:
    dtype = DTYPES[value["dtype"]]
    shape = _sizes(value["shape"])
    chunks = tuple(_chunk(chunk, dtype, shape, file_sizes) for chunk in value["chunks"])
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape) or not chunks:
        raise ValueError(f"the chunks of a tensor of shape {shape} do not make up the tensor")
    return StoredTensor(dtype, shape, chunks)


def _chunk(value: dict[str, Any], dtype: torch.dtype, tensor: tuple[int, ...], file_sizes: Mapping[str, int]) -> Chunk:
    chunk = Chunk(_sizes(value["offsets"]), _sizes(value["shape"]), value["file"], *_sizes([value["start"]]))
    if not isinstance(chunk.file, str) or not SHARD_FILE.fullmatch(chunk.file):
        raise ValueError(f"{chunk.file!r} is not the name of a shard file in this folder")
    if chunk.file not in file_sizes:
        raise ValueError(f"{chunk.file} is not in the manifest")
    if not len(chunk.offsets) == len(chunk.shape) == len(tensor):
        raise ValueError(f"a chunk of {len(chunk.shape)} dimensions in a tensor of {len(tensor)}")
    if any(at + n > size for at, n, size in zip(chunk.offsets, chunk.shape, tensor, strict=True)):
        raise ValueError(f"chunk {chunk.offsets} + {chunk.shape} lies outside its tensor of shape {tensor}")
    if chunk.start + nbytes(dtype, chunk.shape) > file_sizes[chunk.file]:
        raise ValueError(f"a chunk of {chunk.file} ends beyond the end of the file")
    return chunk


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(n) is not int or not 0 <= n < 2**62 for n in values):
        raise ValueError(f"expected a list of sizes, found {str(values)[:100]}")
    return tuple(values)


def to_dcp(index: Index) -> Metadata:
    """The same as DCP's metadata; `storage_data` maps each chunk to its `Chunk`."""
    tensors = {}
    storage: dict[MetadataIndex, tuple[torch.dtype, Chunk]] = {}
    for name, tensor in index.items():
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in tensor.chunks]
        tensors[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
        storage |= {MetadataIndex(name, chunk.offsets): (tensor.dtype, chunk) for chunk in tensor.chunks}
    return Metadata(state_dict_metadata=dict(tensors), storage_data=storage)
