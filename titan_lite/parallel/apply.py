"""The one order in which a model is changed, in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_lite.models.ranks import ALONE
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.activation import apply_activation_checkpointing, draw_memory_budgets
from titan_lite.parallel.compile import compile_blocks
from titan_lite.parallel.context import apply_context_parallel
from titan_lite.parallel.expert import apply_expert_parallel
from titan_lite.parallel.float8 import convert_linears, gather_bytes, gathers_in_float8
from titan_lite.parallel.fsdp import apply_fsdp
from titan_lite.parallel.mesh import sharding_mesh
from titan_lite.parallel.offload import offload_activations
from titan_lite.parallel.pipeline.run import Pipeline, cut_stages, split_model
from titan_lite.parallel.pipeline.stage import PipelinedTransformer
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.tensor import TensorRanks, apply_tensor_parallel, overlap
from titan_lite.parallel.world import World

if TYPE_CHECKING:
    from titan_lite.job import Job


def parallelize(model: Transformer, job: Job, world: World, precision: Precision) -> None:
    """Turns a model on the meta device into this rank's part of it, on its device, its weights still to be filled."""
    convert_linears(model, job, world)  # of the whole model, whose names filters and rules are about
    if world.stages is not None:
        split_model(model, job, world)
    _divide_layers(model, job, world, precision)
    compiled_on_cpu = job.compile.compiles("model") and world.device.type == "cpu"
    apply_activation_checkpointing(model, job.activation_checkpoint, compiled_on_cpu)
    draw_memory_budgets(job.activation_checkpoint, Path(job.job.dump_folder))
    compile_blocks(model, job.compile, job.activation_checkpoint)
    if isinstance(model, PipelinedTransformer):
        cut_stages(model, job, world)
    if job.activation_checkpoint.offload:
        for stage in model.stages:
            offload_activations(stage)
    if world.mesh is not None:
        _shard(model, job, world, precision)
    world.materialize(model, torch.device("cpu") if job.training.enable_cpu_offload else world.device)
    if isinstance(model, PipelinedTransformer):
        model.pipeline = Pipeline(model, job, world, precision.param)


def _divide_layers(model: Transformer, job: Job, world: World, precision: Precision) -> None:
    """Experts, matrices, then rows, over the ranks that share them."""
    mesh, layout = world.mesh, job.parallelism
    if mesh is None:
        return
    if world.expert_meshes:
        sharers = TensorRanks(mesh["tp"]) if layout.expert_tensor_parallel_degree > 1 else ALONE
        of_experts = dict(zip(precision.masters, world.expert_meshes, strict=True))
        apply_expert_parallel(model, of_experts, sharers, world.read)
    if world.tp_size > 1:
        axes = {dtype: each["tp"] for dtype, each in zip(precision.masters, _meshes(world), strict=True)}
        apply_tensor_parallel(model, axes[precision.master], axes)
        if layout.enable_async_tensor_parallel:
            overlap(axes[precision.master])
    if world.cp_size > 1:
        apply_context_parallel(model, mesh["cp"], layout)


def _shard(model: Transformer, job: Job, world: World, precision: Precision) -> None:
    """Parameters over the ranks that see different tokens, each stage by itself."""
    reshard = job.parallelism.fsdp_reshard_after_forward
    if reshard == "default" and world.stages is not None:
        reshard = "never"
    meshes = dict(zip(precision.masters, map(sharding_mesh, _meshes(world)), strict=True))
    of_experts = dict(zip(precision.masters, map(sharding_mesh, world.expert_meshes), strict=False))
    offload = job.training.enable_cpu_offload
    for stage in model.stages:
        apply_fsdp(stage, meshes, of_experts, precision.param, precision.reduce, reshard, offload)
        if gathers_in_float8(job, world) and world.device.type == "cpu":
            gather_bytes(stage)


def _meshes(world: World) -> list[DeviceMesh]:
    """For parameters of each dtype."""
    return [mesh for mesh in (world.mesh, world.second_mesh) if mesh is not None]
