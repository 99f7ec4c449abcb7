"""Models whose blocks have weights only while they compute.

Such a model stands on the meta device. Its units (the blocks, and what has weights outside of them) get their weights
before they run and lose them afterwards: no more than one is in memory, and each forward reads the whole model once.
Those of transformers' model come from its own loader, which gets the shapes of all tensors and the values of some.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from titan_lite.hf.source import Source
from titan_lite.hf.stored import FolderTensors

Values: TypeAlias = Callable[[str], Mapping[str, Tensor]]
"""Path of a module -> its tensors, by their names in it."""


class Streamed:
    """Hooks on the units of a model, by their paths. What belongs to none of them stays in memory."""

    def __init__(self, model: nn.Module, units: Sequence[str], values: Values):
        self._model = model
        inside = tuple(f"{path}." for path in units)
        outside = {name.rpartition(".")[0] for name in model.state_dict() if not name.startswith(inside)}
        self._units, self._outside = units, sorted(outside)
        self.read_from(values)
        for path in units:
            unit = model.get_submodule(path)
            unit.register_forward_pre_hook(lambda unit, _, path=path: self._fill(unit, path))
            unit.register_forward_hook(_empty)

    def read_from(self, values: Values) -> None:
        """Takes the weights from there from now on."""
        self._values = values
        for path in self._outside:
            own = {name: tensor for name, tensor in values(path).items() if "." not in name}
            self._model.get_submodule(path).load_state_dict(own, strict=False, assign=True)

    def beside(self, values: Values) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, tensor where they are taken from, tensor from there) of all weights."""
        for path in (*self._units, *self._outside):
            other = values(path)
            for name, tensor in self._values(path).items():
                if path in self._units or "." not in name:
                    yield f"{path}.{name}", tensor, other[name]

    def _fill(self, unit: nn.Module, path: str) -> None:
        unit.load_state_dict(self._values(path), assign=True)


def _empty(unit: nn.Module, args: Any, result: Any) -> None:
    unit.load_state_dict({name: tensor.to("meta") for name, tensor in unit.state_dict().items()}, assign=True)


def units_of(model: Any) -> list[str]:
    """Paths of the units: what a model of ours shards; layers of transformers, and modules with weights besides."""
    paths = {module: path for path, module in model.named_modules()}
    if hasattr(model, "shard_units"):
        return [paths[unit] for unit in model.shard_units()]
    layers = [path for module, path in paths.items() if type(module).__name__ in model._no_split_modules]
    inside = tuple(f"{path}." for path in layers)
    with_weights = (path for module, path in paths.items() if any(True for _ in module.parameters(recurse=False)))
    return layers + [path for path in with_weights if path not in layers and not path.startswith(inside)]


def values_of(source: Source, model: nn.Module, tied: Mapping[str, str], path: str) -> Mapping[str, Tensor]:
    """The tensors of the module at a path in float32; `tied` has the names of those that the source calls otherwise."""
    values = {}
    for name in model.get_submodule(path).state_dict():
        full = f"{path}.{name}"
        tensor = source.read(full if full in source.meta else tied[full])
        values[name] = tensor.float() if tensor.is_floating_point() else tensor
    return values


class Absent:
    """For transformers' loader: a slice of a file that is never read. Wherever it is sent, it stays a shape."""

    def __init__(self, meta: Tensor):
        self.meta = meta

    def __getitem__(self, index: Any) -> Absent:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.meta.to(dtype)


class BlockLoader:
    """transformers' loader, asked for single modules of a folder's model. `unloaded` are tensors that it has not."""

    def __init__(self, folder: Path, unloaded: Collection[str] = ()):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        import titan_lite.hf.modelling  # noqa: F401  (makes our own models known)

        self._folder, self._unloaded = folder, unloaded
        self._files = FolderTensors(folder)
        self._config = AutoConfig.from_pretrained(folder)
        self._class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]

    def skeleton(self) -> Any:
        """The model without weights."""
        from transformers import GenerationConfig

        model = self._load([])
        model.generation_config = GenerationConfig.from_pretrained(self._folder)
        return model.eval()

    def values(self, path: str) -> Mapping[str, Tensor]:
        """The tensors of the module at a path, and of what it is tied to."""
        model = self._load([path])
        tied = [source for name, source in model.all_tied_weights_keys.items() if name.startswith(f"{path}.")]
        if tied:
            model = self._load([path, *(source.rpartition(".")[0] for source in tied)])
        state: Mapping[str, Tensor] = model.get_submodule(path).state_dict()
        return state

    def _load(self, paths: Sequence[str]) -> Any:
        """The model, with the weights of the modules at these paths."""
        inside = tuple(f"{path}." for path in paths)
        tensors = {
            name: self._files.read(name) if name.startswith(inside) else Absent(meta)
            for name, meta in self._files.meta.items()
        }
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        loaded = self._class.from_pretrained(None, config=self._config, state_dict=tensors, **options)
        return complete(loaded, self._unloaded)


def complete(loaded: Any, unloaded: Collection[str] = ()) -> Any:
    """The model of transformers' loader. ValueError where that misses a tensor, or has one too many: not `unloaded`."""
    model, info = loaded
    found = info | {"unexpected_keys": set(info["unexpected_keys"]).difference(unloaded)}
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(found[kind]) for kind in kinds if found[kind]}
    if wrong:
        raise ValueError(f"transformers loads the folder with {wrong}")
    return model
