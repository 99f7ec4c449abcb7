"""The time of one step by a roofline: each operation at the device's speed or its memory's, collectives over links."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from estimation.devices import Device
from estimation.ops import NEXT_MICRO_BATCH, Op
from estimation.rehearsal import Rehearsal
from titan_lite.config.component import ConfigBase


class Assumptions(ConfigBase):
    """What the estimate takes for granted. Each can be changed with `--assume name=value`."""

    matmul_efficiency: float = 0.7
    """Share of the peak FLOP/s that matrix products reach."""
    attention_efficiency: float = 0.35
    """Share of the peak FLOP/s that attention kernels reach, in scores that the causal mask leaves. FlashAttention-2 on
    an H100: arXiv 2407.08608."""
    bandwidth_efficiency: float = 0.8
    """Share of the memory bandwidth that all other operations reach, which are bound by it."""
    link_efficiency: float = 0.7
    """Share of the links' bandwidth that collectives reach."""
    latency_us: float = 10.0
    """Microseconds that a collective takes to start, for each doubling of its ranks."""
    data_parallel_overlap: float = 1.0
    """Share of data-parallel communication that runs beside computation, as long as there is any."""
    tensor_parallel_overlap: float = 0.0
    """Share of tensor-parallel and all other communication that does."""
    host_overlap: float = 0.0
    """Share of copies to and from host memory, of what is offloaded, that run beside computation."""
    context_gib: float = 1.0
    """CUDA context and libraries' workspaces, outside of torch's allocator; none on a CPU."""
    communicator_gib: float = 0.2
    """NCCL's buffers for each axis of the mesh that has several ranks, outside of torch's allocator; none on a CPU."""


@dataclass(frozen=True)
class Axis:
    """A step's communication over one axis of the mesh."""

    nbytes: int
    """Sum over collectives of each one's largest tensor."""
    count: int
    seconds: float


@dataclass(frozen=True)
class Compute:
    """One step of one rank."""

    seconds: float
    by_kind: Mapping[str, float]
    """Seconds of matmul, attention and pointwise operations."""
    flops: int
    by_phase: Mapping[str, int]
    """FLOPs in forward, backward, recompute (what backward computes once more) and the optimizer."""
    communication: Mapping[str, Axis]
    host_seconds: float
    """Of copies to and from host memory."""
    exposed: float
    """Seconds that grow with the tokens in which ranks that share tokens wait for each other's bytes: what collectives
    between them take beside their start, as far as nothing hides it."""

    @property
    def computing(self) -> float:
        """Seconds in which the device works."""
        return sum(self.by_kind.values())


def compute_of(rehearsal: Rehearsal, device: Device, assumed: Assumptions, copied: int = 0) -> Compute:
    """What the operations of a rehearsal take on the device, with `copied` bytes to and from host memory."""
    kinds: dict[str, float] = {}
    phases: Counter[str] = Counter()
    moved: dict[str, Axis] = {}
    micro_batch = 0
    exposed = 0.0
    for part, events in rehearsal.trace.parts():
        for op in events:
            if not isinstance(op, Op):
                continue
            micro_batch += op == NEXT_MICRO_BATCH
            times = rehearsal.middle if micro_batch == 2 else 1
            if op.kind == "collective":
                axis = rehearsal.groups.get(op.group, "world")
                of_experts = axis in rehearsal.expert_axes and axis not in rehearsal.axes
                axes = rehearsal.expert_axes if of_experts else rehearsal.axes
                start, transfer = _collective_seconds(op, axis, axes, device, assumed)
                seconds = times * (start + transfer)
                if not axis.startswith("dp_"):
                    exposed += times * transfer * (1 - assumed.tensor_parallel_overlap)
                so_far = moved.get(axis, Axis(0, 0, 0.0))
                moved[axis] = Axis(so_far.nbytes + times * op.nbytes, so_far.count + times, so_far.seconds + seconds)
            else:
                phases["recompute" if op.recompute else part.phase] += times * op.flops
                kinds[op.kind] = kinds.get(op.kind, 0.0) + times * _seconds(op, device, assumed)
    kinds.pop(NEXT_MICRO_BATCH.kind, None)
    moved = dict(sorted(moved.items()))
    computing = sum(kinds.values())
    total, left = computing, computing
    host_seconds = copied / (device.host_link * assumed.link_efficiency)
    beside = [
        (axis_.seconds, assumed.data_parallel_overlap if name.startswith("dp_") else assumed.tensor_parallel_overlap)
        for name, axis_ in moved.items()
    ]
    for seconds, overlap in (*beside, (host_seconds, assumed.host_overlap)):
        hidden = min(seconds * overlap, left)
        left -= hidden
        total += seconds - hidden
    return Compute(total, kinds, sum(phases.values()), dict(phases), moved, host_seconds, exposed)


def _seconds(op: Op, device: Device, assumed: Assumptions) -> float:
    peak = device.flops(op.dtype)
    efficiency = assumed.attention_efficiency if op.kind == "attention" else assumed.matmul_efficiency
    return max(op.flops * op.done / (peak * efficiency), op.nbytes / (device.bandwidth * assumed.bandwidth_efficiency))


def _collective_seconds(
    op: Op, axis: str, axes: Mapping[str, int], device: Device, assumed: Assumptions
) -> tuple[float, float]:
    """Alpha and beta: a start for each doubling of the ranks, then bytes over the narrowest link they cross."""
    names, over = list(axes), [name for name in axis.split("+") if name in axes]
    size = math.prod(axes[name] for name in over or names)
    if size == 1:
        return 0.0, 0.0
    stride = math.prod(axes[name] for name in names[names.index(over[-1]) + 1 :]) if over else 1
    passes = 2 if "reduce" in op.name and "scatter" not in op.name else 1
    nbytes = passes * op.nbytes * (size - 1) / size
    rate = device.link
    if size * stride > device.per_node:  # a node's ranks share its adapters, each bringing in a part
        rate = min(rate, device.nic * max(1, device.per_node // stride))
    return assumed.latency_us * 1e-6 * math.ceil(math.log2(size)), nbytes / (rate * assumed.link_efficiency)
