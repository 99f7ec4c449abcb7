"""Optimizer states in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET: Final = 256 * 2**20
"""Bytes of states on the device at a time, as far as single parameters have fewer."""


class HostStates(torch.optim.Optimizer):
    """An optimizer whose states live in host memory, while parameters and gradients stay on their device.

    A step takes the parameters in buckets: states to the device, the inner optimizer's step on these parameters alone,
    states back. The arithmetic is that of the inner optimizer on the device, bit for bit, as long as it treats each
    parameter by itself. The device needs room for one bucket in place of all states (8 bytes per parameter for AdamW in
    float32); each step moves all of them over the bus twice, which for AdamW on a bus of 25 GB/s is 0.64 s per 10^9
    parameters of a rank. Scalars (step counts) stay where they are.
    """

    def __init__(self, inner: torch.optim.Optimizer, bucket_bytes: int = BUCKET):
        # Not the base class's: groups, states and defaults are the inner optimizer's own.
        self.inner, self.bucket_bytes = inner, bucket_bytes
        self.defaults, self.state, self.param_groups = inner.defaults, inner.state, inner.param_groups

    def __repr__(self) -> str:
        return f"HostStates({self.inner!r})"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        whole = [group["params"] for group in self.param_groups]
        try:
            for bucket in self._buckets(whole):
                for group, members in zip(self.param_groups, bucket, strict=True):
                    group["params"] = members
                parameters = [parameter for members in bucket for parameter in members]
                self._move(parameters, to_host=False)
                self.inner.step()
                self._move(parameters, to_host=True)
        finally:
            for group, members in zip(self.param_groups, whole, strict=True):
                group["params"] = members
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # a checkpoint reads host memory without asking the device

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def _buckets(self, whole: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
        """Each group's parameters of a bucket; parameters stand for states, of which they have at most a few."""
        bucket: list[list[Tensor]] = [[] for _ in whole]
        size = 0
        for number, members in enumerate(whole):
            for parameter in members:
                states = 2 * local(parameter).nbytes
                if size and size + states > self.bucket_bytes:
                    yield bucket
                    bucket, size = [[] for _ in whole], 0
                bucket[number].append(parameter)
                size += states
        yield bucket

    def _move(self, parameters: list[Tensor], to_host: bool) -> None:
        for parameter in parameters:
            states: dict[str, Any] = self.state.get(parameter, {})
            for name, value in states.items():
                if isinstance(value, Tensor) and value.ndim:
                    states[name] = on_host(value) if to_host else on_device(value, local(parameter).device)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_host(value: Tensor) -> Tensor:
    """A copy in page-locked memory, where there is a device that copies from it without the processor."""
    source = local(value)
    copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.device.type == "cuda")
    return _with_local(value, copy.copy_(source, non_blocking=True))


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device."""
    return _with_local(value, local(value).to(device, non_blocking=True))


def _with_local(value: Tensor, part: Tensor) -> Tensor:
    """`value` with another local part: wherever that is, as `DTensor.from_local` would move it to the mesh's device."""
    return DTensor(part, value._spec, requires_grad=False) if isinstance(value, DTensor) else part
