"""Weights in float8 with a factor for each block of their matrix, as DeepSeek-V3 publishes them (arXiv 2412.19437)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from titan_lite.config.errors import NOT_AVAILABLE, ConfigError
from titan_lite.hf.shards import common_dtype
from titan_lite.hf.source import Place, Source
from titan_lite.hf.stored import FolderTensors, damaged

FACTORS: Final = "_scale_inv"
"""What a matrix' name is followed by in that of its factors, (rows / height, columns / width), rounded up."""
Block = tuple[int, int]
"""Height and width of what has one factor."""


def block_of(file: Path, settings: Mapping[str, Any]) -> Block | None:
    """The blocks that a config speaks of; None for weights that are not quantized. ConfigError for other methods."""
    if "quantization_config" not in settings:
        return None
    given = settings["quantization_config"]
    if isinstance(given, dict) and (given.get("quant_method"), given.get("fmt", "e4m3")) == ("fp8", "e4m3"):
        block = given.get("weight_block_size")
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
            return block[0], block[1]
    why = "is quantized in a way that is not read"
    allowed = 'a floating-point type, or quant_method "fp8" with a weight_block_size'
    raise ConfigError.at(str(file), why, allowed=allowed, code=NOT_AVAILABLE)


class Dequantized:
    """A folder's tensors, those in float8 times their factors, in the type of the others."""

    def __init__(self, files: FolderTensors, block: Block):
        self.files, self.block = files, block
        narrow = {name for name, meta in files.meta.items() if meta.dtype == torch.float8_e4m3fn}
        self._factors = {name: f"{name}{FACTORS}" for name in narrow}
        factors = set(self._factors.values())
        plain = {name: meta for name, meta in files.meta.items() if name not in narrow | factors}
        wide = common_dtype(list(plain.values())) if plain else torch.float32
        for name in sorted(narrow):
            self._check(name)
        self.meta: Mapping[str, Tensor] = {
            name: meta.to(wide) if name in narrow else meta for name, meta in files.meta.items() if name not in factors
        }

    def _check(self, name: str) -> None:
        shape, path = self.files.meta[name].shape, self.files.places[name].path
        factors = self.files.meta.get(self._factors[name])
        if factors is None:
            raise damaged(path, f"{name} is in float8, and there is no {self._factors[name]}")
        wanted = [-(-size // length) for size, length in zip(shape, self.block, strict=False)]
        if len(shape) != 2 or list(factors.shape) != wanted:
            why = f"has the shape {list(factors.shape)}, and {name} of shape {list(shape)} has {wanted} blocks"
            raise damaged(path, f"{self._factors[name]} {why}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        values = self.files.read(name, start, stop)
        if name not in self._factors:
            return values
        height, width = self.block
        rows = torch.arange(start, start + len(values)) // height
        factors = self.files.read(self._factors[name]).float()[rows]  # (rows, blocks in a row)
        spread = factors.repeat_interleave(width, dim=1)[:, : values.shape[1]]
        return (values.float() * spread).to(self.meta[name].dtype)

    def place(self, name: str) -> Place | None:
        return None if name in self._factors else self.files.place(name)


def stored_weights(folder: Path, block: Block | None) -> Source:
    """The tensors of a folder in floating-point types."""
    files = FolderTensors(folder)
    return files if block is None else Dequantized(files, block)
