"""Expert parallelism: each rank has some of the experts, and tokens travel to them and back.

Experts rest as DTensors on axes of their own: `ep`, and `etp` where ranks split each expert; FSDP shards and replicates
them over the others. So their gradients are summed over what `ep` leaves of the ranks that see different tokens, the
tokens of the others having come to them. Source: arXiv 2006.16668 (GShard), without its capacity: no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from titan_lite.models.ffn.dispatch import Dispatch, Experts, inverse
from titan_lite.models.module import Module
from titan_lite.models.ranks import Ranks
from titan_lite.parallel.tensor import Local, distributed, ops, split_class

Read: TypeAlias = Callable[[Tensor, Sequence[int]], list[int]]
"""From numbers on a device, and what they would be if tokens were spread evenly, to the numbers: see `World.read`."""


class ExpertRanks(Dispatch):
    """The ranks of the `ep` axis. Collectives are functional ones: a compiled block has them in its graph."""

    def __init__(self, mesh: DeviceMesh, sharers: Ranks, read: Read):
        super().__init__(sharers)
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.group = mesh.get_group().group_name
        self._read = read

    def run(self, experts: Experts, x: Tensor, ends: Tensor) -> Tensor:
        """Each expert gets its tokens by rank, those of one rank in their order: the same for every run of a layout."""
        sent = ends.diff(prepend=ends.new_zeros(1)).view(self.size, -1)  # (n, E / n), by destination
        arriving = self._exchange(sent, [1] * self.size, [1] * self.size)  # (n, E / n), by source
        numbers = self._read(torch.cat((sent.sum(1), arriving.sum(1))), 2 * _evenly(len(x), self.size))
        to, of = numbers[: self.size], numbers[self.size :]
        here = self._exchange(x, to, of)  # by source, and by expert of each
        kinds = torch.arange(arriving.shape[1], device=x.device).repeat(self.size)
        order = kinds.repeat_interleave(arriving.flatten(), output_size=len(here)).argsort(stable=True)
        y = experts(here[order], arriving.sum(0).cumsum(0).int())
        return self._exchange(y[inverse(order)], of, to)

    def gather(self, x: Tensor) -> Tensor:
        return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), self.size, self.group))

    def reduce(self, x: Tensor) -> Tensor:
        return ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", self.size, self.group))

    def read(self, number: Tensor, likely: int) -> int:
        return self._read(number[None], [likely])[0]

    def _exchange(self, x: Tensor, to: list[int], of: list[int]) -> Tensor:
        """Rows for this rank, of[r] from rank r, in return for those of x, of which to[r] go there."""
        return ops.wait_tensor(ops.all_to_all_single(x.contiguous(), of, to, self.group))


def apply_expert_parallel(
    model: nn.Module, meshes: Mapping[torch.dtype, DeviceMesh], sharers: Ranks, read: Read
) -> None:
    """Spreads the experts of a model on the meta device over ranks, in place, before tensor parallelism.

    `meshes` has, for each dtype, the mesh of `make_expert_mesh` on which its parameters rest. `sharers` are the ranks
    of the axis `etp`, if it is there.
    """
    mesh = next(iter(meshes.values()))
    dispatch = ExpertRanks(mesh["ep"], sharers, read) if mesh["ep"].size() > 1 else Dispatch(sharers)
    for module in model.modules():
        plan = module.expert_plan() if isinstance(module, Module) else {}
        readers: list[tuple[str, Local]] = []
        for name, dim in plan.items():
            parameter: Any = module._parameters[name]
            if parameter is None:
                continue
            of_experts = expert_axes(meshes[parameter.dtype])
            module._parameters[name] = distributed(parameter, of_experts, _places(dim, of_experts))
            part = dim is not None or of_experts.ndim == 1
            kind = Local("part", axes=of_experts.ndim) if part else Local("share", size=sharers.size, axes=2)
            readers.append((name, kind))
        if readers:
            module.__class__ = split_class(cast(Any, type(module)), tuple(readers), False, False, sharers)
        if isinstance(module, Module):
            module.spread(dispatch)


def expert_axes(mesh: DeviceMesh) -> DeviceMesh:
    """Of a mesh for experts the axes on which they rest before FSDP shards them."""
    return mesh["ep", "etp"] if "etp" in (mesh.mesh_dim_names or ()) else mesh["ep"]


def _places(dim: int | None, mesh: DeviceMesh) -> list[Placement]:
    within: list[Placement] = [Replicate() if dim is None else Shard(dim)]
    return [Shard(0), *within[: mesh.ndim - 1]]


def _evenly(total: int, parts: int) -> list[int]:
    return [(total + part) // parts for part in range(parts)]
