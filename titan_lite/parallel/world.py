"""The processes of a run: who this one is, how they talk, and how one step's micro-batches run through the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule

from titan_lite.parallel.config import Parallelism
from titan_lite.parallel.mesh import SAME_LAYERS, make_expert_mesh, make_mesh
from titan_lite.run.environment import STORE

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer
    from titan_lite.parallel.pipeline.stage import PipelinedTransformer

LossOf: TypeAlias = "Callable[[Transformer], Tensor]"
"""A micro-batch's loss, given the model; given a pipeline stage, that stage's part of it."""

SAVE_TIMEOUT = timedelta(days=1)
"""Ranks wait for each other while a checkpoint is written, however slow the disk."""


def pick_device() -> torch.device:
    """This process's GPU, by `LOCAL_RANK`, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _init_process_group(rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
    """Joins through the launcher's file if there is one, alone if this is the only process, else as torchrun says."""
    path = os.environ.get(STORE)
    store = dist.FileStore(path, size) if path else dist.HashStore() if size == 1 else None
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank if store else -1,
        world_size=size if store else -1,
        timeout=timeout,
    )


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone, by the words of gloo and nccl."""
    of_a_group = isinstance(error, dist.DistError) or "gloo" in str(error)
    signs = ("by peer", "Connection refused", "Broken pipe", "remote process exited")
    return of_a_group and any(sign in str(error) for sign in signs)


@dataclass(frozen=True)
class World:
    """This process among all. A single CPU process needs no process group and has none."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """See `make_mesh`; None without a process group."""
    host_group: dist.ProcessGroup | None = None
    """gloo, for small host-side agreements."""
    save_group: dist.ProcessGroup | None = None
    """gloo, for checkpoints written in the background."""
    second_mesh: DeviceMesh | None = None
    """Equal to `mesh`, with process groups of its own: where FSDP puts parameters of a second dtype."""
    expert_meshes: tuple[DeviceMesh, ...] = ()
    """See `make_expert_mesh`: beside `mesh` and `second_mesh`, where experts are spread over ranks."""
    joined: bool = False
    """Whether `connect` made the process group, and `close` is to leave it."""

    @classmethod
    def connect(
        cls,
        parallelism: Parallelism,
        device: torch.device,
        sharded: bool,
        timeout_seconds: int,
        second_mesh: bool = False,
    ) -> World:
        """Joins the process group that the environment describes (`RANK`, `WORLD_SIZE`, ...; one process without them).

        `sharded` asks for a mesh even where one process is alone, because FSDP also does the mixed precision.
        """
        joined = not dist.is_initialized()
        if joined:
            rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            if size == 1 and not sharded:
                return cls(rank, size, device)
            _init_process_group(rank, size, device, timedelta(seconds=timeout_seconds))
        mesh = make_mesh(parallelism, dist.get_world_size(), device.type)
        host_group = dist.new_group(backend="gloo")
        save_group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        size = dist.get_world_size()
        second = make_mesh(parallelism, size, device.type, own_groups=True) if second_mesh else None
        own_groups = (False, True) if second_mesh else (False,)
        of_experts = tuple(filter(None, (make_expert_mesh(parallelism, size, device.type, own) for own in own_groups)))
        world = cls(dist.get_rank(), size, device, mesh, host_group, save_group, second, of_experts, joined)
        world.set_timeout(timeout_seconds)
        return world

    def set_timeout(self, seconds: int) -> None:
        """How long a collective of the training loop may take from now on."""
        of_meshes = [
            group
            for mesh in (self.mesh, self.second_mesh, *self.expert_meshes)
            if mesh
            for group in mesh.get_all_groups()
        ]
        for group in (dist.group.WORLD, self.host_group, *of_meshes):
            if group is not None:
                _set_pg_timeout(timedelta(seconds=seconds), group)

    @property
    def layout(self) -> str:
        """The layout in words, for people."""
        if self.mesh is None:
            return "one process"
        replicate, shard = self.axis_size("dp_replicate"), self.axis_size("dp_shard")
        data = f"FSDP {shard}" if replicate == 1 else f"HSDP {replicate} x {shard}"
        if self.axis_size("dp_shard") * self.cp_size == 1 < replicate:
            data = f"DDP {replicate}"
        others = {"context": self.cp_size, "tensor": self.tp_size, "pipeline": self.pp_size, "expert": self.ep_size}
        return ", ".join([data, *(f"{name} parallel {size}" for name, size in others.items() if size > 1)])

    @property
    def axes(self) -> dict[str, int]:
        """The mesh's axes and their sizes; nothing without a mesh."""
        return {} if self.mesh is None else dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))

    @property
    def expert_axes(self) -> dict[str, int]:
        """Those of the mesh for experts; nothing where they are not spread over ranks."""
        return {
            axis: size
            for mesh in self.expert_meshes[:1]
            for axis, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
        }

    def axis_size(self, name: str) -> int:
        """Ranks along an axis of the mesh; 1 where there is none."""
        return self.axes.get(name, 1)

    def axis_rank(self, name: str) -> int:
        """Which of them this rank is."""
        return self.mesh.get_local_rank(name) if self.mesh is not None and name in self.axes else 0

    @property
    def tp_size(self) -> int:
        """Ranks that share each layer, neighbours in the order of ranks."""
        return self.axis_size("tp")

    @property
    def cp_size(self) -> int:
        """Ranks that share each row's tokens."""
        return self.axis_size("cp")

    @property
    def pp_size(self) -> int:
        """Ranks that share the layers of a model."""
        return self.axis_size("pp")

    @property
    def ep_size(self) -> int:
        """Ranks over which experts are spread."""
        return self.expert_axes.get("ep", 1)

    @property
    def stages(self) -> DeviceMesh | None:
        """The axis along which ranks have different layers, if there is one."""
        return self.mesh["pp"] if self.mesh is not None and self.pp_size > 1 else None

    @property
    def dp_size(self) -> int:
        """Groups of ranks that read different rows of the batch."""
        return self.size // (self.tp_size * self.cp_size * self.pp_size)

    @property
    def dp_rank(self) -> int:
        """Which of them this rank belongs to."""
        return self.axis_rank("dp_replicate") * self.axis_size("dp_shard") + self.axis_rank("dp_shard")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_dp(self, value: Any) -> list[Any]:
        """The `value` of every data-parallel group, on every rank, by group."""
        inner = self.tp_size * self.cp_size
        return self.gather(value)[: self.size // self.pp_size : inner]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def total(self, *values: float) -> list[float]:
        """Sums over rows, element by element, of what each rank knows of its rows (exact for integers below 2^53).

        Ranks that work on the same rows know the same of them, which counts once.
        """
        totals = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(totals, group=self.host_group)
        return (totals * self.dp_size / self.size).tolist()

    def total_tensor(self, value: Tensor) -> Tensor:
        """The sum of what each rank has computed on its device, of its tokens and layers; the argument stays as it is.

        Tensor-parallel ranks have computed all of it alike, or a part each: then it is 1 / tp_size of the sum.
        """
        if self.size == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed if self.tp_size == 1 else summed / self.tp_size

    def read(self, numbers: Tensor, likely: Sequence[int]) -> list[int]:
        """The numbers of a tensor, which the host waits for.

        `likely` are those of tokens that are spread evenly, for a world whose tensors have no numbers.
        """
        return numbers.tolist()

    def total_of_layers(self, value: Tensor) -> Tensor:
        """As `total_tensor`, of the ranks that have the same layers; each pipeline rank its own."""
        if self.stages is None:
            return self.total_tensor(value)
        assert self.mesh is not None
        summed = value.clone()
        dist.all_reduce(summed, group=self.mesh[SAME_LAYERS].get_group())
        return summed if self.tp_size == 1 else summed / self.tp_size

    def merged(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all ranks have found out about their layers, on every rank."""
        if self.stages is None:
            return found
        of_each = self.gather({name: value.item() for name, value in found.items()})
        return {name: torch.tensor(value) for its in reversed(of_each) for name, value in its.items()}

    def forward_backward(self, model: Transformer, losses: Iterable[LossOf], last: int) -> Tensor:
        """Runs forward and backward of each micro-batch's loss; returns this rank's sum of the losses, detached.

        Gradients are reduced to their shards after each micro-batch, since whole ones would not fit, or after each run
        of the pipeline's schedule, and over replicas after the last one only. `last` is the index of the last loss.
        """
        if self.stages is not None:
            return cast("PipelinedTransformer", model).pipeline.forward_backward(list(losses))
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for index, loss_of in enumerate(losses):
            if isinstance(model, FSDPModule):
                model.set_requires_all_reduce(index == last)
            loss = loss_of(model)
            loss.backward()
            total += loss.detach()
        return total

    def materialize(self, model: nn.Module, device: torch.device) -> None:
        """Gives the parameters of a sharded model on the meta device their memory, not yet their values."""
        for part in getattr(model, "stages", (model,)):
            part.to_empty(device=device)

    def close(self) -> None:
        """Leaves the process group that `connect` joined."""
        if self.joined:
            dist.destroy_process_group()
