"""torchtitan's checkpoints of Llama 3 (DCP folders) as checkpoints of ours. Never used to resume a run of our own.

DCP keeps its index as a pickle: it is read by an unpickler that knows the index's own classes and nothing else, so that
no file can make it run code. Tensors are read by torch's own reader of plain tensors.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_lite.config.errors import BAD_INPUT, FILE_MISSING, ConfigError
from titan_lite.config.load import load_job
from titan_lite.hf.folds import Shape
from titan_lite.hf.importer import Imported, write_import
from titan_lite.hf.rule import Rule
from titan_lite.hf.source import Image, Place
from titan_lite.hf.stored import damaged
from titan_lite.job import Job
from titan_lite.models.transformer import vocab_size_for

METADATA: Final = ".metadata"
ALLOWED: Final = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "StorageMeta"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}
"""What an index is made of, by module; types of tensors come on top."""
NAMES: Final = (
    (r"tok_embeddings\.weight", "embedding.weight"),
    (r"norm\.weight", "norm.weight"),
    (r"output\.weight", "head.output.weight"),
    (r"layers\.(\d+)\.attention\.w([qkvo])\.weight", r"stack.blocks.\1.attention.\2.weight"),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"stack.blocks.\1.ffn.gate.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"stack.blocks.\1.ffn.down.weight"),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"stack.blocks.\1.ffn.up.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"stack.blocks.\1.attention_residual.norm.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"stack.blocks.\1.ffn_residual.norm.weight"),
)
"""Their names, with `model.` before them in older checkpoints, and ours."""
PARTS: Final = re.compile(
    r"(optimizer|optim|lr_scheduler|dataloader|train_state|ft_dataloader)\b.*|(model\.)?freqs_cis"
)
"""What else such a checkpoint holds, which is left out."""


class IndexReader(pickle.Unpickler):
    """Unpickles nothing but what is in ALLOWED."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index of tensors needs")


class DistTensors:
    """The tensors of a DCP folder. ConfigError names the file that is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / METADATA
        try:
            with open(path, "rb") as file:
                index = IndexReader(file).load()
        except FileNotFoundError:
            raise ConfigError.at(str(path), "the file is missing", code=FILE_MISSING) from None
        except Exception as error:  # a damaged pickle raises anything
            raise damaged(path, f"is no index of a DCP checkpoint: {error}") from None
        if not isinstance(index, Metadata):
            raise damaged(path, "is no index of a DCP checkpoint")
        self.places: Mapping[Any, Any] = index.storage_data
        self.tensors = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not PARTS.fullmatch(name)
        }
        self.meta: Mapping[str, Tensor] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in self.tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        entry = self.tensors[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, place in self.places.items():
            if key.fqn == name:
                at, part = key.offset or [0] * whole.dim(), self._stored(name, place)
                region = whole
                for dim, (begin, size) in enumerate(zip(at, part.shape, strict=True)):
                    region = region.narrow(dim, begin, size)
                region.copy_(part)
        return whole[start:stop]

    def place(self, name: str) -> Place | None:
        return None

    def _stored(self, name: str, place: Any) -> Tensor:
        path = self.folder / Path(place.relative_path).name
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ConfigError.at(str(path), f"the file is missing, which holds {name}", code=FILE_MISSING) from None
        except Exception as error:  # a damaged file raises anything
            raise damaged(path, f"{name} in it is damaged: {str(error)[:200]}") from None
        if not isinstance(found, Tensor):
            raise damaged(path, f"{name} in it is no tensor")
        return found


def import_torchtitan(source: Path, config: Path, out: Path) -> Job:
    """Makes `out` of a DCP folder of torchtitan's Llama 3 and of the TOML file that it was trained with.

    Their rotation turns neighbours, which is `layout = "interleaved"` here: weights stay as they are.
    """
    job = load_job(config, files=False)
    tables = job.model.model_dump()
    tables["attention"]["position"]["layout"] = "interleaved"
    tokenizer = job.tokenizer.build()
    tables["vocab_size"] = vocab_size_for(job.model, tokenizer.vocab_size)
    shape = Shape.of(type(job.model).model_validate(tables), tables["vocab_size"], job.training.seq_len)
    stored = DistTensors(source)
    rules = [Rule((name,), (ours,)) for name in stored.meta if (ours := our_name(name))]
    tensors = Image(rules, stored)
    unknown = [name for name in stored.meta if not our_name(name)]
    missing = [name for name in shape.meta if name not in tensors.meta]
    other = [
        f"{name}: {list(tensors.meta[name].shape)}, by {config} {list(meta.shape)}"
        for name, meta in shape.meta.items()
        if name in tensors.meta and tensors.meta[name].shape != meta.shape
    ]
    extra = [name for name in tensors.meta if name not in shape.meta]
    for what, names in (("is no tensor of Llama 3", unknown), ("is missing", missing), ("does not fit", other + extra)):
        if names:
            raise ConfigError.at(str(source), f"{names[0]} {what} ({len(names)} such tensors)", code=BAD_INPUT)
    choice = job.tokenizer.model_dump()
    if choice.get("path"):
        choice["path"] = str(Path(choice["path"]).expanduser().absolute())
    return write_import(Imported(str(source), "llama", tables, job.training.seq_len, tensors, {}, choice=choice), out)


def our_name(name: str) -> str:
    """Our name of a tensor of torchtitan's; empty for one that Llama 3 does not have."""
    bare = name.removeprefix("model.")
    for theirs, ours in NAMES:
        if match := re.fullmatch(theirs, bare):
            return match.expand(ours)
    return ""
