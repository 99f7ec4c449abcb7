"""A rank's part of a tensor, and the dtypes that files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# The dtype codes of the safetensors format, used in the shards' headers and in metadata.json.
DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Shard:
    """The block of a tensor of `shape` that starts at `offsets`; `local` holds its values."""

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def shards_of(tensors: Mapping[str, Tensor]) -> dict[str, Shard]:
    """What this rank holds of each tensor; a DTensor on a mesh that this rank is no part of is left out."""
    shards = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{name}: a checkpoint cannot hold {tensor.dtype}; it can hold {', '.join(DTYPES)}")
        if not isinstance(tensor, DTensor):
            shards[name] = Shard(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())
        elif tensor.device_mesh.get_coordinate() is not None:
            (chunk,) = tensor.__create_chunk_list__()
            shards[name] = Shard(_values(tensor.to_local()).detach(), tuple(tensor.shape), tuple(chunk.offsets))
    return shards


def _values(local: Tensor) -> Tensor:
    """The values of a shard, which may stand in a tensor that says how it is gathered, such as in float8."""
    if not is_traceable_wrapper_subclass(local):
        return local
    names, _ = local.__tensor_flatten__()
    values: Tensor = getattr(local, names[0])
    return values


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
