"""Both models that a verification compares, in float32: whole, or with the weights of one block at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from titan_lite.hf.by_block import BlockLoader, Streamed, complete, units_of, values_of
from titan_lite.hf.choose import Unloaded
from titan_lite.hf.folds import Shape
from titan_lite.hf.source import Source
from titan_lite.hf.stored import FolderTensors
from titan_lite.models.spec import named_state
from titan_lite.models.transformer import Transformer

READS: Final = 32 * 2**30
"""Bytes of weights that greedy continuations may read from the disk where they are not in memory."""


@dataclass(frozen=True)
class Subject:
    """A folder, and what it was made of."""

    folder: Path
    shape: Shape
    ours: Source
    theirs: Source
    """The folder's tensors before they were rounded, under the names of transformers' modules."""
    unloaded: Unloaded
    dtype: torch.dtype
    """Of the folder's weights."""
    exact: bool
    """Whether no weight was computed for a fold, whose sums may come in another order each time."""

    @property
    def parameters(self) -> int:
        """Numbers of the larger of both models."""
        return max(sum(meta.numel() for meta in source.meta.values()) for source in (self.ours, self.theirs))

    def unloaded_otherwise(self) -> list[str]:
        """The names of those that transformers' class does not have and that are not what they should be."""
        files, wanted = FolderTensors(self.folder), self.unloaded.tensors
        return [name for name in wanted.meta if not self.is_written(files.read(name), wanted.read(name))]

    def is_written(self, loaded: Tensor, values: Tensor) -> bool:
        """Whether a tensor that was loaded from the folder is what these values are in its type."""
        if not values.is_floating_point():
            return torch.equal(loaded, values)
        wanted = values.to(self.dtype).to(loaded.dtype)
        if self.exact or loaded.shape != wanted.shape:
            return torch.equal(loaded, wanted)
        allowed = 4 * torch.finfo(self.dtype).eps * wanted.abs().max()
        return bool((loaded - wanted).abs().max() <= allowed)


class Loading(ABC):
    """How models come into memory."""

    name: ClassVar[str]

    @abstractmethod
    def ours(self, subject: Subject) -> Transformer:
        """The checkpoint's model."""

    @abstractmethod
    def theirs(self, subject: Subject) -> Any:
        """The folder's model, as transformers loads it."""

    @abstractmethod
    def unround(self, loaded: Any, subject: Subject) -> list[str]:
        """Gives the folder's model the values that its weights had before they were written in a narrower type.

        Returns the names of those that transformers found otherwise than they should have been written.
        """

    @abstractmethod
    def new_tokens(self, subject: Subject, wanted: int) -> int:
        """How many of the wanted tokens each continuation may have."""


class Whole(Loading):
    """All weights at once."""

    name = "whole"

    def ours(self, subject: Subject) -> Transformer:
        model = _ours_on_meta(subject.shape).to_empty(device="cpu")
        with torch.no_grad():
            for name, tensor in named_state(model):
                tensor.copy_(subject.ours.read(name))
        return model

    def theirs(self, subject: Subject) -> Any:
        return load_theirs(subject.folder, subject.unloaded.names)

    def unround(self, loaded: Any, subject: Subject) -> list[str]:
        tensors, otherwise = loaded.state_dict(), []
        for name in subject.theirs.meta:
            values = subject.theirs.read(name)
            if not subject.is_written(tensors[name], values):
                otherwise.append(name)
            tensors[name].copy_(values)
        return otherwise

    def new_tokens(self, subject: Subject, wanted: int) -> int:
        return wanted


class ByBlock(Loading):
    """The weights of one block at a time."""

    name = "by_block"

    def ours(self, subject: Subject) -> Transformer:
        model = _ours_on_meta(subject.shape)
        Streamed(model, units_of(model), partial(values_of, subject.ours, model, {}))
        return model

    def theirs(self, subject: Subject) -> Any:
        loader = BlockLoader(subject.folder, subject.unloaded.names)
        model = loader.skeleton()
        self._streamed = Streamed(model, units_of(model), loader.values)
        return model

    def unround(self, loaded: Any, subject: Subject) -> list[str]:
        values = partial(values_of, subject.theirs, loaded, loaded.all_tied_weights_keys)
        pairs = self._streamed.beside(values)
        otherwise = [name for name, tensor, right in pairs if not subject.is_written(tensor, right)]
        self._streamed.read_from(values)
        return otherwise

    def new_tokens(self, subject: Subject, wanted: int) -> int:
        return max(0, min(wanted, READS // (4 * subject.parameters) - 1))


def load_theirs(folder: Path, unloaded: Collection[str] = ()) -> Any:
    """The folder's model in float32, as `from_pretrained` loads it, without permission to run code.

    `unloaded` are tensors that its class does not have.
    """
    from transformers import AutoModelForCausalLM

    import titan_lite.hf.modelling  # noqa: F401  (makes our own models known)

    options: Any = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    return complete(AutoModelForCausalLM.from_pretrained(folder, **options), unloaded).eval()


def _ours_on_meta(shape: Shape) -> Transformer:
    with torch.device("meta"):
        model: Transformer = shape.config.build(vocab_size=shape.vocab_size)
    return model.to(torch.float32).eval()


def blocks_of(model: Any) -> list[nn.Module]:
    """The distinct blocks: the layers of a model of transformers."""
    ours = getattr(model, "model", model)
    if isinstance(ours, Transformer):
        return list(ours.stack.blocks.values())
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
