"""The mesh of all ranks: an axis for each way in which they divide the work."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_lite.parallel.config import Parallelism

SHARDS = "dp_shard_cp"
"""The axes dp_shard and cp as one: ranks that see different tokens, over which FSDP shards."""


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
    return mesh


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes FSDP works on: both where parameters are replicated over groups of shards, else the shards alone."""
    shards = SHARDS if "cp" in (mesh.mesh_dim_names or ()) else "dp_shard"
    return mesh["dp_replicate", shards] if mesh["dp_replicate"].size() > 1 else mesh[shards]
