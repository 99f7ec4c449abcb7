"""Sharded data parallelism with FSDP2: each unit is gathered for its forward and backward, gradients are summed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titan_lite.models.transformer import Transformer


def apply_fsdp(
    model: Transformer,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: Literal["default", "always", "never"],
    cpu_offload: bool,
) -> None:
    """Shards the model's units, then what is left with the model itself, over `mesh`, in place.

    Inputs are not cast: the embedding sets the dtype of the residual stream, and rotation tables stay in float32.
    """
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    units = list(model.shard_units())
    for unit in units:
        # By default not the last unit: its backward follows at once, and gathering it again would be for nothing.
        last = unit is units[-1]
        reshard = reshard_after_forward == "always" or (reshard_after_forward == "default" and not last)
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the global token count, so gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes FSDP works on: both where parameters are replicated over groups of shards, else the shards alone."""
    return mesh if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every unit is sharded again, which else only a backward does."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.train()
