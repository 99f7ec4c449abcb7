"""A small model and its AdamW state in several layouts, with values that depend on names only. For the pools."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.checkpoint.helpers import STATE, make_manager, same_bits
from titan_lite.checkpoint.manager import Start
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.state import materialize_optimizer_state, model_tensors, optimizer_tensors
from titan_lite.checkpoint.world import Alone, World
from titan_lite.config.errors import ConfigError
from titan_lite.parallel.world import World as RealWorld

WATCHED: list[str] = []


class Tiny(nn.Module):
    """Sizes that 2 and 4 ranks do not divide; 3 rows leave one of 4 ranks without any."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 10)
        self.down = nn.Linear(10, 3)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))


def values(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(layout: str) -> dict[str, Tensor]:
    """The tensors of a model in `layout`: "one", "fsdp", "hsdp" (2 x 2), "fsdp_tp" (2 x 2), or "replicated"."""
    model = Tiny()
    if layout in ("fsdp", "hsdp", "fsdp_tp"):
        mesh = mesh_of(layout)
        if layout == "fsdp_tp":
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            mesh = mesh["dp"]
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    materialize_optimizer_state(optimizer)
    return model_tensors(model) | optimizer_tensors(model, optimizer)


@functools.cache
def mesh_of(layout: str) -> DeviceMesh:
    n = dist.get_world_size()
    if layout == "fsdp":
        return init_device_mesh("cpu", (n,), mesh_dim_names=("dp",))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp") if layout == "fsdp_tp" else ("rep", "dp"))


def expected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank should hold of each tensor: tensor parallelism cuts first, FSDP cuts what is left."""
    result = {}
    for name, tensor in tensors.items():
        result[name] = values(name, tensor.shape, tensor.dtype)
        if isinstance(tensor, DTensor):
            where = tensor.device_mesh.get_coordinate()
            assert where is not None
            for axis in reversed(range(tensor.device_mesh.ndim)):
                dim = getattr(tensor.placements[axis], "dim", None)
                if dim is not None:
                    result[name] = part(result[name], dim, where[axis], tensor.device_mesh.size(axis))
    return result


def part(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Rank `rank`'s part of `size` equal ones, rounded up; the last ranks may get less, or nothing."""
    total = tensor.shape[dim]
    each = -(-total // size)
    begin = min(rank * each, total)
    return tensor.narrow(dim, begin, min(each, total - begin))


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


@functools.cache
def world() -> World:
    if not dist.is_initialized():
        return Alone()
    groups = [dist.new_group(backend="gloo") for _ in range(2)]
    return RealWorld(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), None, *groups)


def save(folder: Path, layout: str, step: int, mode: str = "disabled") -> None:
    tensors = build(layout)
    for name, mine in expected(tensors).items():
        local(tensors)[name].copy_(mine)
    manager = make_manager(folder, world(), async_mode=mode)
    manager.save(step, tensors, STATE)
    if mode != "disabled":
        for tensor in local(tensors).values():
            tensor.zero_()  # training goes on at once, and uses its own collectives
        for _ in range(20):
            total = torch.ones(1)
            if dist.is_initialized():
                dist.all_reduce(total)
            manager.poll()
    manager.wait(raises=True)
    assert manager.latest() == step


def load(step: Path, layout: str) -> bool:
    """Loads into zeros, without a `pickle.find_class`; whether every bit of this rank is right."""
    if not WATCHED:
        sys.addaudithook(lambda event, _: WATCHED.append(event) if event == "pickle.find_class" else None)
    tensors = build(layout)
    for tensor in local(tensors).values():
        tensor.zero_()
    WATCHED[:] = ["on"]
    state = make_manager(step.parent.parent, world()).load(Start(step, resume=True, model_only=False), tensors)
    assert WATCHED == ["on"], WATCHED
    assert state == STATE
    return same_bits(local(tensors), expected(tensors))


def refused(step: Path) -> str:
    """The message of the ConfigError that loading raises."""
    try:
        restore(step, build("fsdp"), world())
    except ConfigError as error:
        return str(error)
    return "not refused"


def stage_names(step: Path) -> dict[str, Any]:
    """A pipeline of two stages: each rank saves and asks for its own tensor only; then one asks for too little."""
    name = f"model.layers.{dist.get_rank()}"
    make_manager(step.parent.parent, world()).save(1, {name: torch.full((3,), 1.0 + dist.get_rank())}, {})
    mine = {name: torch.zeros(3)}
    restore(step, mine, world())
    problem = ""
    try:
        restore(step, mine if dist.get_rank() == 0 else {}, world())
    except ConfigError as error:
        problem = str(error)
    return {"values": mine[name].tolist(), "problem": problem}


def failing_save(folder: Path) -> tuple[str, list[str]]:
    """Rank 1 cannot write its shard: what every rank is told, and what is left."""
    from titan_lite.checkpoint import writer
    from titan_lite.checkpoint.save import SaveError

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    original = writer.write_safetensors
    if dist.get_rank() == 1:
        writer.write_safetensors = full  # type: ignore[assignment]
    told = ""
    try:
        make_manager(folder, world()).save(9, build("fsdp"), STATE, last=True)
    except SaveError as error:
        told = str(error)
    finally:
        writer.write_safetensors = original
    dist.barrier()
    return told, [path.name for path in (folder / "checkpoint").iterdir()]


def die_in_save(folder: Path) -> None:
    """Rank 1 is killed in the middle of its shard."""
    import os
    import signal

    from titan_lite.checkpoint.safetensors_file import HashingFile

    original = HashingFile.write

    def write(self: HashingFile, data: bytes | memoryview) -> None:
        if self.size > 100:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, data)

    if dist.get_rank() == 1:
        HashingFile.write = write  # type: ignore[method-assign]
    make_manager(folder, world()).save(8, build("fsdp"), STATE)
