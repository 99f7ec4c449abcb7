"""A run's model, filled with the weights of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.checkpoint.shard import shards_of
from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, ConfigError
from titan_lite.hf.folds import Shape
from titan_lite.hf.read import open_folder, our_tensors, same_model
from titan_lite.hf.source import Source
from titan_lite.models.transformer import Transformer


def opened(path: Path, model: Transformer.Config, quantized: bool = False, compares: bool = True) -> Source:
    """The folder's weights as those of this very model. ConfigError where it holds another one, or is damaged.

    Weights in float8 are recognised; `quantized` asks for them. For `compares` see `our_tensors`.
    """
    if not path.is_dir():
        raise ConfigError.at("checkpoint.initial_load_path", "is no folder", str(path), code=FILE_MISSING)
    folder = open_folder(path)
    if quantized and folder.block is None:
        why = f"is set, but the weights in {path} are not quantized"
        raise ConfigError.at("checkpoint.initial_load_in_hf_quantized", why, True, "false", code=CROSS_FIELD)
    if problems := list(same_model(folder, model)):
        raise ConfigError(problems)
    shape = Shape.of(model, folder.tables["vocab_size"], folder.context_len)
    return our_tensors(folder, shape, compares).tensors


def fill(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Fills {"model.<name>": tensor} in place, of a sharded one this rank's part. ConfigError names what differs."""
    for name, shard in shards_of(tensors).items():
        inner = name.removeprefix("model.")
        meta = source.meta.get(inner)
        if meta is None or tuple(meta.shape) != shard.shape:
            there = "none" if meta is None else list(meta.shape)
            why = f"the folder has {there} for {inner}, and this run's has the shape {list(shard.shape)}"
            raise ConfigError.at("checkpoint.initial_load_path", why)
        target = tensors[name]
        local = target.to_local() if isinstance(target, DTensor) else target
        if not local.dim():
            values = source.read(inner)
        else:
            values = source.read(inner, shard.offsets[0], shard.offsets[0] + local.shape[0])
            for dim in range(1, local.dim()):
                values = values.narrow(dim, shard.offsets[dim], local.shape[dim])
        with torch.no_grad():
            local.copy_(values)
