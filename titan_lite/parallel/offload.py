"""What blocks leave for backward, in host memory meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from titan_lite.models.transformer import Transformer
from titan_lite.parallel.fsdp import gathered_parameters

SMALLEST: Final = 4096
"""Bytes; below that a tensor stays, as a copy of it would take longer to start than to make."""
AHEAD: Final = 4
"""Storages that come back before backward asks for them, while it works with another."""


def offload_activations(model: Transformer) -> None:
    """Makes everything that autograd saves in the stack wait for backward in host memory, in place.

    Around the whole stack, outside of checkpoints, compiled blocks and FSDP's hooks: what a checkpoint keeps (the input
    of a block) and what a compiled graph keeps go the same way as what eager operators keep. Parameters stay.
    """
    stack = model.stack
    forward, parameters = stack.forward, ParameterStorages(stack)

    def offloaded(*args: Any) -> Any:
        store = HostStore(parameters)
        with saved_tensors_hooks(store.pack, store.unpack):
            return forward(*args)

    stack.forward = offloaded


class ParameterStorages:
    """Tells whether a storage holds a parameter: whole ones that FSDP gathered included."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._known: set[int] = set()
        self._all_gathered = False

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        if not self._all_gathered:
            # FSDP makes the place of a unit's whole parameters when it gathers the unit for the first time, and keeps
            # it for all later steps.
            gathered = list(gathered_parameters(self.module))
            self._all_gathered = None not in gathered
            present = (*self.module.parameters(), *(tensor for tensor in gathered if tensor is not None))
            self._known = {parameter.untyped_storage()._cdata for parameter in present}
        return storage._cdata in self._known


class View(NamedTuple):
    """A tensor as a part of a stored storage."""

    stored: Stored
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class HostStore:
    """What one forward saved. Views of one storage, and tensors that several operators save, move once."""

    def __init__(self, parameters: ParameterStorages):
        self.parameters = parameters
        self._stored: weakref.WeakValueDictionary[tuple[int, int], Stored] = weakref.WeakValueDictionary()
        self._last: Stored | None = None

    def pack(self, tensor: Tensor) -> View | Tensor:
        """Runs when autograd saves a tensor."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or storage in self.parameters:
            return tensor
        # An operator in place makes other contents of the same storage. Where the source is gone, another storage
        # cannot have its address: the reference to it keeps that taken.
        key = (storage._cdata, tensor._version)
        stored = self._stored.get(key)
        if stored is None:
            stored = self._stored[key] = Stored(tensor, before=self._last)
            self._last = stored
        return View(stored, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, packed: View | Tensor) -> Tensor:
        """Runs when backward needs it."""
        if isinstance(packed, Tensor):
            return packed
        self._last = None
        content = packed.stored.load()
        empty = torch.empty(0, dtype=packed.dtype, device=content.device)
        return empty.set_(content.untyped_storage(), packed.offset, packed.size, packed.stride)


class Stored:
    """One storage's bytes in host memory; from its first use in backward to the last one on its device again.

    Copies run beside computation: each device has a stream for them, and host memory is page-locked.
    """

    def __init__(self, tensor: Tensor, before: Stored | None):
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.device = tensor.device
        self.source = StorageWeakRef(tensor.untyped_storage())
        self.host = _to_host(source)
        self._back: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        self._before = None if before is None else weakref.ref(before)

    def load(self) -> Tensor:
        """The bytes on the device; the ones that were stored last before these start to come back too."""
        for stored in (self, *self._earlier(AHEAD)):
            stored.start()
        assert self._back is not None
        if self._arrival is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._arrival)
            self._back.record_stream(current)
            self._arrival = None
        return self._back

    def start(self) -> None:
        """Begins to copy to the device, once."""
        if self._back is not None:
            return
        if self.device.type == "cpu":
            self._back = self.host.clone()
            return
        stream = _copies(self.device)
        with torch.cuda.stream(stream):
            self._back = self.host.to(self.device, non_blocking=True)
        self._arrival = stream.record_event()

    def _earlier(self, n: int) -> Iterator[Stored]:
        """Those whose turn comes next in backward."""
        stored: Stored | None = self
        for _ in range(n):
            stored = None if stored is None or stored._before is None else stored._before()
            if stored is None:
                return
            yield stored


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's copies run, both ways: a copy back waits for the copy out."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _to_host(source: Tensor) -> Tensor:
    if source.device.type == "cpu":
        return source.clone()
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    stream = _copies(source.device)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        host.copy_(source, non_blocking=True)
    source.record_stream(stream)  # the memory is not given away before the copy is done
    return host
