"""Does a checkpoint fit this run? All differences at once, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from titan_lite.checkpoint.index import INDEX, Index
from titan_lite.config.errors import BAD_INPUT, Problem, show

SHOWN = 20  # names listed of each kind of difference
ANEW = "checkpoint.exclude_from_loading = [the names, or their beginnings] of what is to start anew"


def selects(names: Sequence[str], key: str) -> bool:
    """Whether `key` is one of `names` or lies below one of them ("optim" selects "optim.norm.weight.exp_avg")."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def names_hash(names: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(names)).encode())


def tensor_problems(folder: Path, index: Index, tensors: Mapping[str, Tensor], converts: bool) -> list[Problem]:
    """Tensors that the checkpoint lacks, or has in another shape or, unless the load `converts` them, another dtype."""
    found: dict[str, list[str]] = {"missing": [], "shape": [], "dtype": []}
    for name, tensor in sorted(tensors.items()):
        stored = index.get(name)
        if stored is None:
            found["missing"].append(show(name))
        elif stored.shape != tuple(tensor.shape):
            found["shape"].append(f"{show(name)}: {list(stored.shape)}, this run {list(tensor.shape)}")
        elif stored.dtype != tensor.dtype and not converts:
            found["dtype"].append(f"{show(name)}: {_short(stored.dtype)}, this run {_short(tensor.dtype)}")
    texts = {
        "missing": "the checkpoint lacks {n} tensors of this run",
        "shape": "{n} tensors have another shape in the checkpoint",
        "dtype": "{n} tensors have another dtype in the checkpoint, and values are never cast silently",
    }
    allowed = {"missing": ANEW}
    return [_listed(folder, texts[kind], names, allowed.get(kind, "")) for kind, names in found.items() if names]


def unexpected(folder: Path, index: Index, wanted: set[str]) -> list[Problem]:
    """Tensors of the checkpoint that no rank of this run has asked for."""
    extra = [show(name) for name in sorted(set(index) - wanted)]
    return [_listed(folder, "the checkpoint has {n} tensors that this run does not", extra)] if extra else []


def model_problems(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Problem]:
    """Keys of `[model]` that differ between the run that wrote the checkpoint and this one."""
    before, now = dict(flatten("model", saved)), dict(flatten("model", current))
    missing = object()
    problems = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, missing), now.get(key, missing)
        if old != new:
            told = ["absent" if value is missing else show(value) for value in (old, new)]
            why = f"{folder} was written by a run of another model: there it is {told[0]}, here {told[1]}"
            problems.append(Problem(BAD_INPUT, key, why))
    return problems


def flatten(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}", value


def _listed(folder: Path, text: str, names: list[str], allowed: str = "") -> Problem:
    more = [f"... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    lines = "".join(f"\n      {name}" for name in names[:SHOWN] + more)
    return Problem(BAD_INPUT, str(folder / INDEX), text.format(n=len(names)) + ":" + lines, allowed=allowed)


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
