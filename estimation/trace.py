"""What a step does, operation by operation: storages that come and go, arithmetic, and communication.

The trace of a real step on this machine and of a fake one for another are the same list.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_iter

from estimation.ops import Op, op_of
from titan_lite.run.device import native_bf16

BLOCK_BYTES = 512
"""What the CUDA caching allocator hands out storages in units of."""


class Part(NamedTuple):
    """A stretch of a step that repeated layers repeat."""

    phase: str
    """persistent (what is there before the step), forward, backward or optimizer."""
    name: str
    """The unit at work, by its name in the model; empty before, between and behind them."""
    visit: int
    """How often this phase has come to that unit before."""


class Alloc(NamedTuple):
    """A storage comes to be, or grows from nothing again."""

    storage: int
    nbytes: int
    op: str
    """What made it."""
    like: int = -1
    """Of several that one operation makes of as many, such as an optimizer's: the storage it is made of."""
    stream: int = 0
    """The stream at work, from which an allocator takes memory: 0 = that of computation."""


class Free(NamedTuple):
    """A storage is gone, or shrinks to nothing."""

    storage: int


Event = Alloc | Free | Op


@dataclass
class Trace:
    """Events in order, cut into parts."""

    events: list[Event] = field(default_factory=list)
    cuts: list[tuple[int, Part]] = field(default_factory=list)
    """(index of the first event, part)."""
    roles: dict[int, str] = field(default_factory=dict)
    """Storage -> what it is known to be: see `memory.py`."""

    def parts(self) -> Iterator[tuple[Part, list[Event]]]:
        """The parts in order, each with its events."""
        ends = [index for index, _ in self.cuts[1:]] + [len(self.events)]
        for (start, part), end in zip(self.cuts, ends, strict=True):
            yield part, self.events[start:end]


class Tracer(TorchDispatchMode):
    """Records into `trace` while it is entered. Storages that are there before are told by `own`.

    Sees what is dispatched: nothing inside of a compiled graph.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES, on_cpu: bool = False) -> None:
        """`on_cpu`: with what this machine's kernels need while they run."""
        super().__init__()
        self.block_bytes, self.on_cpu = block_bytes, on_cpu
        self.trace = Trace()
        self._numbers: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._next = 0
        self._visits: dict[tuple[str, str], int] = {}
        self._in_backward = False
        self._stream = 0
        self._streams: dict[torch.cpu.Stream, int] = {}
        self._output: weakref.ref[Tensor] | None = None
        """What the unit before left; where the next one takes it as it is, nothing lies between them."""

    # ---- what users call

    def own(self, tensors: Iterator[Tensor], role: str) -> None:
        """Storages of `tensors` have this role; those not seen before come to be now."""
        for tensor in tensors:
            self._see(tensor, "own")
            for part in _plain(tensor):
                self.trace.roles[self._numbers[_key(part)]] = role

    def enter(self, phase: str, name: str) -> None:
        """From here on, events are of another part."""
        self._in_backward = phase == "backward"
        visit = self._visits.get((phase, name), 0)
        self._visits[phase, name] = visit + 1
        self.trace.cuts.append((len(self.trace.events), Part(phase, name, visit)))

    def watch(self, units: dict[str, nn.Module]) -> list[Callable[[], None]]:
        """Cuts the trace where a unit's forward and backward begin and end; returns what takes the hooks away."""
        handles = []
        for name, unit in units.items():
            handles.append(unit.register_forward_pre_hook(self._before(name), prepend=True, with_kwargs=True))
            handles.append(unit.register_forward_hook(self._behind(name), prepend=True, with_kwargs=True))
            handles.append(unit.register_forward_hook(self._left, with_kwargs=True))
        return [handle.remove for handle in handles]

    # ---- recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # operations on what it wraps come here one by one
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self in _paused:
            return result
        op = op_of(func, args, kwargs, result)
        if op is not None:
            # Gradients are computed with gradients off, and what backward computes once more is not.
            again = _again[-1] or (self._in_backward and torch.is_grad_enabled())
            self.trace.events.append(op._replace(recompute=again))
        if role := _ROLES_OF_ARGUMENTS.get(func.namespace):
            for tensor in tree_iter((args, kwargs, result)):
                if isinstance(tensor, Tensor):
                    self._see(tensor, str(func))
                    self.trace.roles.setdefault(self._numbers[_key(tensor)], role)
        models = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        if isinstance(result, (list, tuple)) and len(result) == len(models):
            for tensor, model in zip(result, models, strict=True):
                self._see(tensor, str(func), self._numbers.get(_key(model), -1))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, str(func))
        if self.on_cpu:
            self._scratch(list(_scratch_on_cpu(func, args, op, result)))
        return result

    def __enter__(self) -> Tracer:
        _entered.append(self)
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            self._resize(storage, size)
            self._resized(storage, before, size)
            return storage

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        self._stream_context, torch.cpu.stream = torch.cpu.stream, self._on
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _entered.remove(self)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        torch.cpu.stream = self._stream_context
        self._alive.clear()  # with it go the callbacks: what dies from now on is none of the trace

    @contextmanager
    def _on(self, stream: torch.cpu.Stream) -> Iterator[None]:
        """What FSDP does beside computation, on the streams of a device; on a CPU they are one."""
        before, self._stream = self._stream, self._streams.setdefault(stream, len(self._streams) + 1)
        try:
            yield
        finally:
            self._stream = before

    def _see(self, tensor: Tensor, op: str, like: int = -1) -> None:
        for part in _plain(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key in self._numbers:
                continue
            number = self._next
            self._next += 1
            self._numbers[key] = number
            self._alive[number] = weakref.ref(storage, partial(self._gone, key, number))
            if nbytes := self._rounded(storage.nbytes()):
                self.trace.events.append(Alloc(number, nbytes, op, like, self._stream))

    def _gone(self, key: int, number: int, _: object) -> None:
        del self._numbers[key], self._alive[number]
        self.trace.events.append(Free(number))

    def _resized(self, storage: torch.UntypedStorage, before: int, size: int) -> None:
        number = self._numbers.get(storage._cdata)
        if number is None or before == size:
            return
        if before:
            self.trace.events.append(Free(number))
        if size:
            self.trace.events.append(Alloc(number, self._rounded(size), "resize_", -1, self._stream))
        self.trace.roles.setdefault(number, "unsharded parameters")

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.block_bytes) * self.block_bytes

    def _scratch(self, sizes: list[int]) -> None:
        """What a kernel holds while it runs."""
        for nbytes in sizes:
            self.trace.events.append(Alloc(self._next, nbytes, "scratch"))
            self._next += 1
        self.trace.events += [Free(self._next - 1 - i) for i in range(len(sizes))]

    # ---- parts

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.enter("forward", name)
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
                    if self._output is None or tensor is not self._output():
                        tensor.register_hook(lambda _: self.enter("backward", ""))
                    return

        return hook

    def _behind(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self.enter("backward", name))
                    self._output = weakref.ref(tensor)
                    return

        return hook

    def _left(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Behind all other hooks: FSDP frees a unit's whole parameters in one."""
        self.enter("forward", "")


def _scratch_on_cpu(func: Any, args: Any, op: Op | None, result: Any) -> Iterator[int]:
    """Bytes that a CPU's kernel needs beside its result, where a device's needs none.

    Elementwise operations convert operands to one dtype before they begin. Without units for bfloat16, matrix products
    in it sum up in float32 first. gloo gathers into a buffer of its own, and scatters sums out of a copy of its input.
    """
    if torch.Tag.pointwise in func.tags:
        operands = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim and arg.is_floating_point()]
        common = reduce(torch.promote_types, [operand.dtype for operand in operands], torch.bfloat16)
        yield from (arg.numel() * common.itemsize for arg in operands if arg.dtype != common)
    elif (
        op is not None
        and op.name in ("mm", "addmm", "bmm")
        and op.dtype == torch.bfloat16
        and not native_bf16(torch.device("cpu"))
    ):
        yield 4 * result.numel()
    elif op is not None and op.kind == "collective" and ("gather" in op.name or "scatter" in op.name):
        yield op.nbytes


_entered: list[Tracer] = []
_paused: list[Tracer] = []
_again = [False]


def note(op: Op) -> None:
    """Records an operation that nobody dispatches: a compiled kernel."""
    for tracer in _entered:
        tracer.trace.events.append(op)


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is recorded."""
    before = list(_paused)
    _paused.extend(_entered)
    try:
        yield
    finally:
        _paused[:] = before


@contextmanager
def recomputing(again: bool) -> Iterator[None]:
    """Operations compute once more what was computed before, or not."""
    _again.append(again)
    try:
        yield
    finally:
        _again.pop()


_ROLES_OF_ARGUMENTS = {"c10d": "communication", "_c10d_functional": "communication"}
"""Storages that go through collectives and are nothing else."""


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor consists of that has memory: a DTensor's local part, numbers in float8 and their scale, ..."""
    if isinstance(tensor, DTensor):
        yield from _plain(tensor._local_tensor)
    elif is_traceable_wrapper_subclass(tensor):
        for name in (*getattr(tensor, "__slots__", ()), *getattr(tensor, "__dict__", ())):
            if isinstance(part := getattr(tensor, name, None), Tensor):
                yield from _plain(part)
    else:
        yield tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def traced(tracer: Tracer, units: dict[str, nn.Module]) -> Iterator[Trace]:
    """Records what happens inside, cut by `units`."""
    undo = tracer.watch(units)
    try:
        with tracer:
            yield tracer.trace
    finally:
        for action in undo:
            action()
