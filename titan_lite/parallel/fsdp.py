"""Sharded data parallelism with FSDP2: each unit is gathered for its forward and backward, gradients are summed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard

from titan_lite.models.spec import collect_specs
from titan_lite.models.stack import Streams
from titan_lite.models.transformer import Transformer


def apply_fsdp(
    model: Transformer,
    meshes: Mapping[torch.dtype, DeviceMesh],
    expert_meshes: Mapping[torch.dtype, DeviceMesh],
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: Literal["default", "always", "never"],
    cpu_offload: bool,
) -> None:
    """Shards the model's units, then what is left with the model itself, in place.

    `meshes` has the mesh of the parameters of each dtype, `expert_meshes` that of experts which are spread over ranks,
    if there are any. Inputs are not cast: the embedding sets the dtype of the
    residual stream, and rotation tables stay in float32.
    """
    mesh = next(iter(meshes.values()))
    placement = _by_group(meshes, expert_meshes) if len(meshes) > 1 or expert_meshes else None
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
    for module in _sharded(model):
        # The loss is already divided by the global token count, so gradients are summed, never averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if model.embedding in units and _only_tables(model.embedding):
        cast(FSDPModule, model.embedding).set_unshard_in_backward(False)
    if reshard_after_forward != "always":
        _keep_through_backward(model, [unit for unit in units if unit in several])
    _prefetch(model)


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    parts = getattr(model, "stages", (model,))
    return (module for part in parts for module in part.modules() if isinstance(module, FSDPModule))


def gathered_parameters(model: nn.Module) -> Iterator[Tensor | None]:
    """The whole tensor of each sharded parameter, whose storage is empty while it is not gathered; None before that
    happened for the first time."""
    for module in _sharded(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            yield from (getattr(parameter, "_unsharded_param", None) for parameter in group.fsdp_params)


def _only_tables(embedding: nn.Module) -> bool:
    """Whether rows are all it takes of its parameters: backward needs their numbers, not what is in them. A matrix that
    widens rows sums over them."""
    return all(spec.role == "embed" and spec.fan_in == 1 for spec in collect_specs(embedding).values())


def _keep_through_backward(model: Transformer, units: Sequence[nn.Module]) -> None:
    """Keeps units that run several times whole to the end of backward; FSDP would gather them for each run again."""
    if not units:
        return
    kept = [cast(FSDPModule, unit) for unit in units]

    def shard_again() -> None:
        for unit in kept:
            unit.reshard()

    def at_the_end_of_backward(_: Tensor) -> None:
        Variable._execution_engine.queue_callback(shard_again)

    def watch(_: nn.Module, args: Any, streams: Streams) -> None:
        if streams.x.requires_grad:
            streams.x.register_hook(at_the_end_of_backward)

    for unit in kept:
        unit.set_reshard_after_backward(False, recurse=False)
    model.stack.register_forward_hook(watch)


def _prefetch(model: Transformer) -> None:
    """Makes each unit ask for the parameters of the next before it computes, where the next is always the same.

    Where it is not (a block that now another block follows and now the head), FSDP's own way stays: the gathering of a
    unit starts when the host reaches it, which is ahead of the device. Asking for one of several would gather units in
    vain or hold them for long. In backward FSDP goes back through what it recorded in forward, repeated units included.
    Only where forward ran units without gradients, as a recurrent core's first iterations, would that gather for
    nothing: they ask for what comes before their first run.
    """
    order = [model, *model.unit_order()]
    following: dict[nn.Module, list[nn.Module]] = defaultdict(list)
    preceding: dict[nn.Module, list[nn.Module]] = defaultdict(list)
    for unit, after in pairwise(order):
        if after is not unit:
            following[unit].append(after)
            preceding[after].append(unit)
    for unit, units in following.items():
        if len(set(units)) == 1:
            cast(FSDPModule, unit).set_modules_to_forward_prefetch([cast(FSDPModule, units[0])])
    for unit, runs in model.stack.executions().items():
        if runs.forward > runs.graded and len(set(preceding[unit])) > 1:
            cast(FSDPModule, unit).set_modules_to_backward_prefetch([cast(FSDPModule, preceding[unit][0])])


def _by_group(
    meshes: Mapping[torch.dtype, DeviceMesh], expert_meshes: Mapping[torch.dtype, DeviceMesh]
) -> Callable[[nn.Parameter], ShardPlacementResult]:
    """What keeps parameters of different dtypes apart, and those of experts that are spread over ranks from others.

    FSDP gathers and reduces together what has one process group, and takes no parameters of two dtypes into one.
    """

    def info(mesh: DeviceMesh) -> FSDPMeshInfo:
        hybrid = mesh.ndim == 2
        return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0) if hybrid else FSDPMeshInfo(mesh, 0)

    infos = {(dtype, False): info(mesh) for dtype, mesh in meshes.items()}
    infos |= {(dtype, True): info(mesh) for dtype, mesh in expert_meshes.items()}

    def place(parameter: nn.Parameter) -> ShardPlacementResult:
        of_experts = isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())
        found = infos[parameter.dtype, of_experts]
        return ShardPlacementResult(Shard(_even_dim(parameter, found.shard_mesh_size) if of_experts else 0), found)

    return place


def _even_dim(parameter: nn.Parameter, parts: int) -> int:
    """The first dimension of a rank's experts that is cut into equal parts: they may be fewer than these. Else 0."""
    assert isinstance(parameter, DTensor)
    return next((dim for dim, size in enumerate(parameter.to_local().shape) if size % parts == 0), 0)


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
    for module in _sharded(model):
        module.reshard()
