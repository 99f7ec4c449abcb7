"""Tensor and sequence parallelism: one walk over the model's modules, which say themselves how they are split.

A parameter rests as a DTensor on the `tp` axis, and a module's forward reads the local part of it: its class becomes a
subclass with a property for each parameter, so that names, state dicts and the module's own code stay as they are.
What ranks tell each other stands at the borders of modules, or where a module asks `Module.ranks` for it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from titan_lite.models.ranks import Ranks
from titan_lite.parallel.plan import GATHER, ROW, Style

ops = torch.ops._c10d_functional

# The norm of all gradients is one number, which takes an all-reduce for each axis of the mesh.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
# What a collective has waited for counts as a view, and nothing here changes the residual stream in place.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")


class TensorRanks(Ranks):
    """The ranks of the `tp` axis. Collectives are functional ones: a compiled block has them in its graph."""

    def __init__(self, mesh: DeviceMesh):
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.group = mesh.get_group().group_name

    def gather(self, x: Tensor, training: bool) -> Tensor:
        return self._gathered(x, dim=1) if training else x

    def reduce(self, x: Tensor, training: bool) -> Tensor:
        if not training:
            return self.sum(x)
        parts = torch.cat(x.chunk(self.size, dim=1))  # (n B, T / n, ...)
        return ops.wait_tensor(ops.reduce_scatter_tensor(parts, "sum", self.size, self.group))

    def own(self, x: Tensor, training: bool) -> Tensor:
        return x.chunk(self.size)[self.rank] if training else x

    def sum(self, x: Tensor) -> Tensor:
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", self.group))

    def sum_alike(self, x: Tensor) -> Tensor:
        y: Tensor = _SumAlike.apply(self, x)
        return y

    def max(self, x: Tensor) -> Tensor:
        return ops.wait_tensor(ops.all_reduce(x.detach().contiguous(), "max", self.group))

    def whole(self, x: Tensor) -> Tensor:
        y: Tensor = _Whole.apply(self, x)
        return y

    def _gathered(self, x: Tensor, dim: int) -> Tensor:
        parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), self.size, self.group))
        return torch.cat(parts.chunk(self.size), dim=dim)


class _SumAlike(torch.autograd.Function):
    """A sum over ranks all of which go on in the same way: their gradients are the same, and count once."""

    @staticmethod
    def forward(ctx: Any, ranks: TensorRanks, x: Tensor) -> Tensor:
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: TensorRanks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks._gathered(x, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.chunk(ctx.ranks.size, dim=-1)[ctx.ranks.rank]


@dataclass(frozen=True)
class Local:
    """How a forward reads its part of a parameter."""

    kind: Literal["part", "whole", "share", "rows"]
    """part: the shard; whole: all of it; share: 1/n of each element; rows: some rows of all of it."""
    first: int = 0
    count: int = 0
    """For `rows`."""
    size: int = 1
    """n."""
    axes: int = 1
    """Of the mesh on which the parameter rests; others share what it is on the last of them."""

    def __call__(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > self.axes:
            return parameter  # sharded by FSDP too, and so outside of forward: as it rests
        if self.kind == "part":
            return parameter.to_local()
        # Others have the same elements, and use them on other tokens or heads.
        local = parameter.to_local(grad_placements=[*parameter.placements[:-1], Partial()])
        if self.kind == "share":
            return local / self.size
        return local.narrow(0, self.first, self.count) if self.kind == "rows" else local


class UnplannedError(ValueError):
    """A part of the model says nothing of how it is split."""


def styles(model: nn.Module) -> dict[nn.Module, dict[str, Style]]:
    """What the plans of all modules come to: {module: {"" for itself, or a parameter of its own: style}}.

    Raises UnplannedError where a parameter is left.
    """
    found: dict[nn.Module, dict[str, Style]] = {}
    claimed: set[nn.Module] = set()
    for module in model.modules():
        if module in claimed:
            continue
        for name, style in getattr(module, "tp_plan", dict)().items():
            if name in module._modules:
                child: Any = module._modules[name]
                child = getattr(child, "owner", child)
                claimed.update(child.modules())
                _claim(found, child, style)
            elif name == "" or getattr(module, name) is not None:
                _note(found, module, name, style)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in found.get(module, {}):
                raise UnplannedError(f"{path}.{name} of {type(module).__name__} has no tensor-parallel plan")
    return found


def _claim(found: dict[nn.Module, dict[str, Style]], child: nn.Module, style: Style) -> None:
    """A style for all that is in a child."""
    if style.word == "row":
        _note(found, child, "", style)
    for module in child.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                _note(found, module, name, style)


def _note(found: dict[nn.Module, dict[str, Style]], module: nn.Module, name: str, style: Style) -> None:
    before = found.setdefault(module, {}).setdefault(name, style)
    assert before == style, f"{name} of {type(module).__name__} is split in two ways: {before} and {style}"


def place(style: Style, shape: torch.Size, rank: int, size: int) -> tuple[Placement, Local]:
    """Where a parameter of this style and shape rests, and how rank `rank` of `size` reads it."""
    if style.word == "row":
        return (Shard(1), Local("part")) if len(shape) > 1 else (Replicate(), Local("share", size=size))
    if style.word == "seq":
        return Replicate(), Local("whole")
    groups = style.groups or shape[0]
    if groups % size == 0:
        return Shard(0), Local("part")
    assert style.repeats, f"{groups} parts for {size} ranks"
    assert size % groups == 0, f"{groups} parts for {size} ranks"
    count = shape[0] // groups
    return Replicate(), Local("rows", rank * groups // size * count, count)


def local_shapes(model: nn.Module, size: int) -> dict[nn.Module, Sequence[int]]:
    """{module with a weight: the shape of what one of `size` ranks reads of it}, where the weight can be cut so."""
    found: dict[nn.Module, Sequence[int]] = {}
    for module, of in styles(model).items():
        if (style := of.get("weight")) is None:
            continue
        first, *others = cast(Tensor, module.weight).shape
        if style.word == "col":
            groups = style.groups or first
            first = first // groups * max(1, groups // size)
        elif style.word == "row":
            others = [others[0] // size, *others[1:]]
        found[module] = (first, *others)
    return found


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, meshes: Mapping[torch.dtype, DeviceMesh]) -> None:
    """Splits a model on the meta device over the ranks of `mesh`, in place.

    `meshes` has, for each dtype, the axis of the same ranks on which its parameters rest.
    """
    ranks = TensorRanks(mesh)
    for module, found in styles(model).items():
        readers: list[tuple[str, Local]] = []
        for name in filter(None, found):
            parameter: Any = module._parameters[name]
            if isinstance(parameter, DTensor):
                continue  # of experts, which are spread over axes of their own
            placement, local = place(found[name], parameter.shape, ranks.rank, ranks.size)
            module._parameters[name] = distributed(parameter, meshes[parameter.dtype], [placement])
            readers.append((name, local))
        own, cls = found.get(""), cast(Hashable, type(module))
        module.__class__ = split_class(cls, tuple(readers), own == GATHER, own == ROW, ranks)
    for module in model.modules():
        getattr(module, "split", _nothing)(ranks)
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not left, f"these have been left out: {left}"


def overlap(mesh: DeviceMesh) -> None:
    """Lets the compiler cut the ranks' collectives, and the products beside them, into pieces that run side by side.

    Source: torch's asynchronous tensor parallelism (inductor's micro-pipeline pass over symmetric memory).
    """
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def _nothing(ranks: Ranks) -> None:
    pass


def distributed(parameter: nn.Parameter, mesh: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    """The parameter as a DTensor, of which this rank keeps its part."""
    local: Tensor = parameter.data
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            size, before = mesh.size(axis), local.shape[placement.dim]
            local = local.chunk(size, dim=placement.dim)[mesh.get_local_rank(axis)].contiguous()
            assert local.shape[placement.dim] * size == before, "parts are equal"
    whole = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


@cache
def split_class(
    cls: Any, readers: tuple[tuple[str, Local], ...], gathers: bool, reduces: bool, ranks: TensorRanks
) -> type[nn.Module]:
    """A subclass whose instances read local parameters and talk to the other ranks. Equal modules share one."""

    def forward(self: nn.Module, x: Any, *args: Any) -> Any:
        y = cls.forward(self, ranks.gather(x, self.training) if gathers else x, *args)
        return ranks.reduce(y, self.training) if reduces else y

    members: dict[str, Any] = {name: _reader(name, local) for name, local in readers}
    if gathers or reduces:
        members["forward"] = forward
    return type(f"Split{cls.__name__}", (cls,), members)


def _reader(name: str, local: Local) -> property:
    def read(self: nn.Module) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return local(parameter)

    return property(read)
