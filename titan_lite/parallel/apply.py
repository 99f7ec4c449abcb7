"""The one order in which a model is changed, in place: float8, tensor parallel, checkpointing, compile, FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from titan_lite.models.transformer import Transformer
from titan_lite.parallel.activation import apply_activation_checkpointing, draw_memory_budgets
from titan_lite.parallel.compile import compile_blocks
from titan_lite.parallel.float8 import convert_linears
from titan_lite.parallel.fsdp import apply_fsdp
from titan_lite.parallel.mesh import sharding_mesh
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.tensor import apply_tensor_parallel, overlap
from titan_lite.parallel.world import World

if TYPE_CHECKING:
    from titan_lite.job import Job


def parallelize(model: Transformer, job: Job, world: World, precision: Precision) -> None:
    """Turns a model on the meta device into this rank's part of it, on its device, its weights still to be filled."""
    convert_linears(model, job, world)
    existing = [mesh for mesh in (world.mesh, world.second_mesh) if mesh is not None]
    if world.tp_size > 1:
        axes = {dtype: mesh["tp"] for dtype, mesh in zip(precision.masters, existing, strict=True)}
        apply_tensor_parallel(model, axes[precision.master], axes)
        if job.parallelism.enable_async_tensor_parallel:
            overlap(axes[precision.master])
    apply_activation_checkpointing(model, job.activation_checkpoint)
    draw_memory_budgets(job.activation_checkpoint, Path(job.job.dump_folder))
    compile_blocks(model, job.compile)
    offload = job.training.enable_cpu_offload
    if world.mesh is not None:
        reshard = job.parallelism.fsdp_reshard_after_forward
        meshes = dict(zip(precision.masters, map(sharding_mesh, existing), strict=True))
        apply_fsdp(model, meshes, precision.param, precision.reduce, reshard, offload)
    world.materialize(model, torch.device("cpu") if offload else world.device)
