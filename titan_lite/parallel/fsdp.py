"""Sharded data parallelism with FSDP2: each unit is gathered for its forward and backward, gradients are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from titan_lite.models.transformer import Transformer


def apply_fsdp(
    model: Transformer,
    meshes: Mapping[torch.dtype, DeviceMesh],
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: Literal["default", "always", "never"],
    cpu_offload: bool,
) -> None:
    """Shards the model's units, then what is left with the model itself, in place.

    `meshes` has the mesh of the parameters of each dtype. Inputs are not cast: the embedding sets the dtype of the
    residual stream, and rotation tables stay in float32.
    """
    mesh = next(iter(meshes.values()))
    placement = _by_dtype(meshes) if len(meshes) > 1 else None
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload, shard_placement_fn=placement)
    units = list(model.shard_units())
    several = model.stack.executions()
    for unit in units:
        # By default not the last unit: its backward follows at once, and gathering it again would be for nothing. Nor
        # one that runs several times in a forward, and would be gathered as often.
        kept = unit is units[-1] or unit in several
        reshard = reshard_after_forward == "always" or (reshard_after_forward == "default" and not kept)
        shard(unit, reshard_after_forward=reshard)
    shard(model, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the global token count, so gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _by_dtype(meshes: Mapping[torch.dtype, DeviceMesh]) -> Callable[[nn.Parameter], ShardPlacementResult]:
    """What keeps parameters of different dtypes apart: FSDP gathers and reduces together what has one process group.

    It does not take parameters of two dtypes into one such group.
    """

    def info(mesh: DeviceMesh) -> FSDPMeshInfo:
        hybrid = mesh.ndim == 2
        return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0) if hybrid else FSDPMeshInfo(mesh, 0)

    places = {dtype: ShardPlacementResult(Shard(0), info(mesh)) for dtype, mesh in meshes.items()}
    return lambda parameter: places[parameter.dtype]


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes FSDP works on: both where parameters are replicated over groups of shards, else the shards alone."""
    return mesh["dp_replicate", "dp_shard"] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every unit is sharded again, which else only a backward does."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(model)
        model.train()


def reshard(model: nn.Module) -> None:
    """Frees whole parameters that a forward without a backward has left behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
