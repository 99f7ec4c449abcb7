"""The mesh of all ranks: an axis for each way in which they divide the work."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_lite.parallel.config import Parallelism

SHARDS = "dp_shard_cp"
"""The axes dp_shard and cp as one: ranks that see different tokens, over which FSDP shards."""

# FSDP wants replicas and shards as one mesh of two axes, and there is no other way to it yet.
warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")


SAME_LAYERS = "same_layers"
"""All axes but pp as one: ranks that have the same layers. There with a pp axis only."""


def make_mesh(parallelism: Parallelism, world_size: int, device_type: str, own_groups: bool = False) -> DeviceMesh:
    """All ranks: axes pp, dp_replicate, dp_shard, cp, tp, the outermost first; the process group must exist.

    Neighbours talk the most. Of pp, cp and tp those are there that have more than one rank.
    `own_groups`: with process groups that no other mesh has, not even for an axis over all ranks.
    """
    degree = parallelism.data_parallel_degree(world_size)
    assert degree is not None, "the config check lets no other degrees through"
    replicate = parallelism.data_parallel_replicate_degree
    sizes = {
        "pp": parallelism.pipeline_parallel_degree,
        "dp_replicate": replicate,
        "dp_shard": degree // replicate,
        "cp": parallelism.context_parallel_degree,
        "tp": parallelism.tensor_parallel_degree,
    }
    sizes = {axis: size for axis, size in sizes.items() if size > 1 or axis.startswith("dp_")}
    backend = "nccl" if device_type == "cuda" else dist.get_backend()
    override: Any = dict.fromkeys(sizes, backend) if own_groups else None
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=override)
    if "cp" in sizes:
        mesh["dp_shard", "cp"]._flatten(SHARDS, backend_override=backend if own_groups else None)
    if "pp" in sizes and not own_groups:
        mesh[tuple(axis for axis in sizes if axis != "pp")]._flatten(SAME_LAYERS)
    return mesh


def make_expert_mesh(
    parallelism: Parallelism, world_size: int, device_type: str, own_groups: bool = False
) -> DeviceMesh | None:
    """The same ranks for experts, with axes pp, dp_replicate, dp_shard_mod_ep, ep, etp; None where they need none.

    `ep` takes of the ranks that see different tokens those that are nearest to each other, and of `tp` too where these
    do not split each expert, which is `etp`. Of pp and etp those are there that have more than one rank.
    """
    if not parallelism.spreads_experts:
        return None
    degree = parallelism.data_parallel_degree(world_size)
    assert degree is not None, "the config check lets no other degrees through"
    ep, replicate = parallelism.expert_parallel_degree, parallelism.data_parallel_replicate_degree
    sizes = {
        "pp": parallelism.pipeline_parallel_degree,
        "dp_replicate": replicate,
        "dp_shard_mod_ep": parallelism.token_ranks(degree // replicate) // ep,
        "ep": ep,
        "etp": parallelism.expert_tensor_parallel_degree,
    }
    sizes = {axis: size for axis, size in sizes.items() if size > 1 or axis not in ("pp", "etp")}
    override: Any = None
    if own_groups:
        override = dict.fromkeys(sizes, "nccl" if device_type == "cuda" else dist.get_backend())
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=override)


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes FSDP works on: both where parameters are replicated over groups of shards, else the shards alone."""
    axes = mesh.mesh_dim_names or ()
    shards = SHARDS if "cp" in axes else next(axis for axis in axes if axis.startswith("dp_shard"))
    return mesh["dp_replicate", shards] if mesh["dp_replicate"].size() > 1 else mesh[shards]
