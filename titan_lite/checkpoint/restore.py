"""Loading a step folder: verify every file, compare every name, and only then fill the tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_lite.checkpoint.compare import names_hash, selects, tensor_problems, unexpected
from titan_lite.checkpoint.folder import MANIFEST, refuse
from titan_lite.checkpoint.index import INDEX, Index, index_from_json
from titan_lite.checkpoint.manifest import Manifest, read_file, read_manifest, verify
from titan_lite.checkpoint.reader import read_tensors
from titan_lite.checkpoint.world import Alone, World, agreed
from titan_lite.checkpoint.writer import TRAIN_STATE
from titan_lite.config.errors import ConfigError

log = logging.getLogger(__name__)

MAX_JSON = 2**30  # bytes of metadata.json or train_state.json
MODEL = "model"


def read_index(folder: Path, manifest: Manifest) -> Index:
    """The tensor index of a step folder. Raises ConfigError naming the file."""
    if INDEX not in manifest.files:
        raise refuse(folder / MANIFEST, f"it does not list {INDEX}")
    sizes = {name: file.size for name, file in manifest.files.items()}
    return index_from_json(read_file(folder / INDEX, MAX_JSON), folder / INDEX, sizes)


def read_train_state(folder: Path) -> dict[str, Any]:
    """The trainer's own state as it was saved. Raises ConfigError naming the file."""
    try:
        state = json.loads(read_file(folder / TRAIN_STATE, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise refuse(folder / TRAIN_STATE, f"it is not valid JSON: {error}") from None
    if not isinstance(state, dict):
        raise refuse(folder / TRAIN_STATE, "it does not hold a table")
    return state


def verified_manifest(folder: Path, world: World) -> Manifest:
    """The manifest of a step folder whose files have all been checked, the ranks sharing the work. Collective."""
    with agreed(world):
        manifest = read_manifest(folder)
    with agreed(world):
        if problems := verify(folder, manifest, world.rank, world.size):
            raise ConfigError(problems)
    return manifest


def restore(
    folder: Path,
    tensors: Mapping[str, Tensor],
    world: World | None = None,
    model_only: bool = False,
    exclude: Sequence[str] = (),
) -> Manifest:
    """Fills `tensors` ({"model.<name>": ..., "optim.<name>.<slot>": ...}) in place from a step folder. Collective.

    Every file is verified first. Names, shapes and dtypes must be those of the checkpoint: all of them, or with
    `model_only` those under "model", whose values are then converted where the dtype is another. What `exclude` selects
    (a name, or the first parts of one) keeps its values and may be absent. Raises ConfigError on every rank alike.
    """
    world = world or Alone()
    manifest = verified_manifest(folder, world)
    with agreed(world):
        index = read_index(folder, manifest)
    load_verified(folder, index, tensors, world, model_only, exclude)
    return manifest


def load_verified(
    folder: Path, index: Index, tensors: Mapping[str, Tensor], world: World, model_only: bool, exclude: Sequence[str]
) -> None:
    """`restore` for a folder whose files have been checked and whose index has been read."""

    def loads(name: str) -> bool:
        return not selects(exclude, name) and (not model_only or selects([MODEL], name))

    wanted = {name: tensor for name, tensor in tensors.items() if loads(name)}
    index = {name: stored for name, stored in index.items() if loads(name)}
    names = _all_names(world, set(wanted))
    with agreed(world):
        problems = tensor_problems(folder, index, wanted, model_only) + unexpected(folder, index, names)
        if problems:
            raise ConfigError(problems)
    dtypes = {(index[name].dtype, tensor.dtype) for name, tensor in wanted.items()}
    for stored, ours in sorted(dtypes, key=str) if world.rank == 0 else ():
        if stored != ours:
            log.info("The weights of %s are converted from %s to %s", folder, stored, ours)
    with agreed(world):
        read_tensors(folder, index, wanted)


def _all_names(world: World, mine: set[str]) -> set[str]:
    """The union of the ranks' names. They differ only between pipeline stages: hashes travel first."""
    if len(set(world.gather(names_hash(sorted(mine))))) == 1:
        return mine
    return set().union(*world.gather(sorted(mine)))
