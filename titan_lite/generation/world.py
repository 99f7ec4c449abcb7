"""The processes of a command that runs a model: one, or as many as it is split over."""

from __future__ import annotations

import os
from typing import Final

from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.parallel.config import Parallelism
from titan_lite.parallel.world import World, pick_device

PATIENCE: Final = 86_400
"""Seconds that ranks wait for the first one, which may wait for somebody to type."""


def connect(tensor_parallel: int) -> World:
    """Joins the other ranks. ConfigError where there are not as many processes as the model is to be split over."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size != tensor_parallel:
        why = f"needs as many processes, and there {'is' if size == 1 else 'are'} {size}"
        allowed = f"{size}, or torchrun --nproc-per-node {tensor_parallel}"
        raise ConfigError.at("--tensor-parallel", why, tensor_parallel, allowed, code=CROSS_FIELD)
    layout = Parallelism(data_parallel_shard_degree=1, tensor_parallel_degree=tensor_parallel)
    return World.connect(layout, pick_device(), sharded=False, timeout_seconds=PATIENCE)
