"""What a run tells about itself in its checkpoints."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_lite.checkpoint.compare import names_hash
from titan_lite.checkpoint.index import Index
from titan_lite.checkpoint.manifest import FileSum, Manifest, ModelSummary


@dataclass(frozen=True)
class RunFacts:
    """What the trainer knows of the run. Fingerprints are opaque text; "" means unknown and is never compared."""

    config: str
    """The resolved config as TOML text."""
    model: dict[str, Any] = field(default_factory=dict)
    """The [model] table (JSON values): has to be the same when the run is resumed."""
    tokenizer: str = ""
    data: str = ""
    layout: dict[str, int] = field(default_factory=dict)
    """Parallel degrees by mesh axis."""


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from; `parent` is the step saved or loaded before it."""

    run_id: str
    step: int
    parent: int | None
    model_only: bool
    world_size: int


def describe(facts: RunFacts, origin: Origin, index: Index, files: Mapping[str, FileSum]) -> Manifest:
    """The manifest of a save that is about to be completed."""
    shapes = {name: tensor.shape for name, tensor in index.items() if name.startswith("model.")}
    summary = ModelSummary(
        tensors=len(shapes),
        parameters=sum(map(math.prod, shapes.values())),
        xxh3_128=names_hash([f"{name} {list(shape)}" for name, shape in shapes.items()]),
        config=facts.model,
    )
    return Manifest(
        run_id=origin.run_id,
        step=origin.step,
        parent_step=origin.parent,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        config=facts.config,
        versions={"torch": str(torch.__version__), "titan_lite": _own_version(), "python": platform.python_version()},
        tokenizer=facts.tokenizer,
        data=facts.data,
        world_size=origin.world_size,
        layout=facts.layout,
        model=summary,
        model_only=origin.model_only,
        files=dict(files),
    )


def _own_version() -> str:
    try:
        return importlib.metadata.version("titan_lite")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
