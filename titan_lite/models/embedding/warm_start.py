"""Embedding rows that are taken over from another model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.errors import FILE_MISSING, ConfigError, Problem
from titan_lite.config.fields import Folder

if TYPE_CHECKING:
    from titan_lite.job import Job

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
KEY = "model.embedding.warm_start"


class WarmStart(Component):
    """Where the rows of an embedding come from, when they do not come from the init slot."""

    frozen: bool = False
    """Whether the rows stay as they are."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "warm_start"
        default_type: ClassVar[str | None] = "none"

        def misfits(self, job: Job, width: int) -> Iterable[Problem]:
            """What speaks against filling a table whose rows have this width; keys are relative to the embedding."""
            return ()

    def fill(self, weight: Tensor) -> None:
        """Writes this rank's part of `weight` (V, width), plain or sharded, in place."""
        raise NotImplementedError


class NoWarmStart(WarmStart):
    """Rows as the init slot drew them."""

    class Config(WarmStart.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config):
        pass

    def fill(self, weight: Tensor) -> None:
        pass


class FileWarmStart(WarmStart):
    """Rows copied from a safetensors file, of the very same shape. Source: arXiv 2405.20053 (OPT's embedding in LSWT).

    They are read once, after the initial weights: a run that resumes has them in its checkpoint.
    """

    class Config(WarmStart.Config):
        type: Literal["file"] = "file"
        path: Folder = Field(examples=["other/model.safetensors"])
        """A .safetensors file, or the folder of a published model with one or several."""
        tensor: str = Field(examples=["model.embed_tokens.weight"])
        """Name of the embedding in it, for instance "transformer.wte.weight"."""
        frozen: bool = False
        """Keep the rows as they are: no gradient, no weight decay."""

        def misfits(self, job: Job, width: int) -> Iterable[Problem]:
            from titan_lite.models.transformer import vocab_size_for

            try:
                stored = find_tensor(self.path, self.tensor)
                known = job.model.vocab_size or job.tokenizer.known_vocab_size
                # Other tokenizers tell their size when they are built: then rows are counted when they are copied.
                rows = (vocab_size_for(job.model, known),) if known else stored.shape[:1]
                stored.require_shape((*rows, width))
            except ConfigError as error:
                yield from error.problems

    def __init__(self, config: Config):
        self.config, self.frozen = config, config.frozen

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        # As in `initialize`: half a second to import, and checking a config reads this file too.
        from safetensors import safe_open

        from titan_lite.checkpoint.shard import shards_of

        stored = find_tensor(self.config.path, self.config.tensor)
        stored.require_shape(tuple(weight.shape))
        shard = shards_of({"weight": weight})["weight"]
        if shard.local.numel():
            rows, columns = (slice(o, o + n) for o, n in zip(shard.offsets, shard.local.shape, strict=True))
            with safe_open(stored.file, framework="pt") as file:
                shard.local.copy_(file.get_slice(stored.name)[rows, columns])
        logger.info("The embedding starts as %s of %s", stored.name, stored.file)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def require_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ConfigError unless the shape is this one."""
        if self.shape == shape:
            return
        why = f"has the shape {list(self.shape)} in {self.file}, this model's embedding {list(shape)}"
        allowed = f"a tensor of shape {list(shape)}"
        if len(self.shape) == 2:
            allowed += f", or a model with vocab_size = {self.shape[0]} and rows of width {self.shape[1]}"
        raise _refused("tensor", why, self.name, allowed)


def find_tensor(path: str, name: str) -> StoredTensor:
    """The tensor `name` of a safetensors file or of a folder with such files. ConfigError where there is none.

    Reads the files' headers only. Every problem has the code of a missing file: another machine may have another one.
    """
    place = Path(os.path.expanduser(path))
    if not place.exists():
        raise _refused("path", "there is no such file or folder", path)
    found: list[str] = []
    for file in _files(place, path, name):
        names = _read_names(file, path)
        if name in names:
            return StoredTensor(file, name, names[name])
        found += names
    from titan_lite.config.schema import nearest

    allowed = ", ".join(sorted(found)[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    raise _refused("tensor", f"{place} has no tensor of this name", name, allowed, nearest(name, found))


def _files(place: Path, path: str, name: str) -> list[Path]:
    """The files that may hold the tensor: the one that an index names, or else all."""
    if not place.is_dir():
        return [place]
    index = place / INDEX
    if index.is_file():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(files[name])} if name in files else set(map(str, files.values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise _refused("path", f"{index} is not an index of safetensors files", path) from None
        return [place / file for file in sorted(names)]
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise _refused("path", "the folder holds no .safetensors file", path)
    return files


def _read_names(file: Path, path: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _refused("path", f"{file} cannot be read as a safetensors file: {error}", path) from None


def _refused(key: str, why: str, value: str, allowed: str = "", nearest: str = "") -> ConfigError:
    return ConfigError.at(f"{KEY}.{key}", why, value, allowed, nearest, code=FILE_MISSING)
