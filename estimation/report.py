"""An estimate for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from estimation.compute import Assumptions
from estimation.devices import GIB
from estimation.estimate import Estimate
from estimation.memory import Memory
from estimation.question import Outcome
from titan_lite.config.errors import show

KEPT_LINES = 4
"""Of what modules keep for backward."""


def text(found: Estimate, tokens: float | None = None, changes: Sequence[Outcome] | None = None) -> str:
    """Some twenty lines: verdict first, then what it is made of and what it rests on.

    `changes` are those that make it fit; None where nobody asked for them.
    """
    advice = [] if changes is None else ["", *_advice(found, changes)]
    return "\n".join((*_verdict(found), *advice, "", *_memory(found), "", *_time(found, tokens), "", *_basis(found)))


def mesh_words(found: Estimate) -> str:
    """The ranks and the axes they are split over."""
    ranks = "1 rank" if found.world_size == 1 else f"{found.world_size} ranks"
    mesh = " x ".join(f"{name} {size}" for name, size in found.axes.items() if size > 1) or "nothing split"
    return f"{ranks} ({mesh})"


def memory_place(memory: Memory) -> str:
    """The moment of the peak in words."""
    part = memory.peak.part
    return f"{part.phase} of {part.name}" if part.name else part.phase


def _verdict(found: Estimate) -> list[str]:
    verdict = {True: "fits", False: "DOES NOT FIT", None: "may not fit: the estimate is an upper bound"}[found.fits]
    side = "to spare" if found.spare_gib >= 0 else "too much"
    return [
        f"{found.device.name}, {mesh_words(found)}, {found.parameters:,} parameters",
        f"{verdict}: {abs(found.spare_gib):.2f} GiB {side} of {found.device.memory_gib:.1f} GiB",
    ]


def _advice(found: Estimate, changes: Sequence[Outcome]) -> list[str]:
    if not changes:
        return ["nothing that was tried makes it fit: more devices, or larger ones"]
    lines = ["cheapest changes that make it fit:"]
    before = 1 / (found.tokens_per_second_per_device * found.world_size)
    for outcome in changes:
        cost = 100 * (outcome.seconds_per_token / before - 1)
        lines.append(
            f"  {outcome.step_seconds:8.3f} s per step ({cost:+.0f}% per token), {outcome.reserved_gib:.2f} GiB"
            f" reserved, {outcome.spare_gib:.2f} GiB to spare"
        )
        lines += [f"      {key} = {show(value)}" for key, value in outcome.changes.items()]
    return lines


def _memory(found: Estimate) -> list[str]:
    peak = found.memory.peak
    lines = [f"memory of a rank at its peak, in {memory_place(found.memory)}:"]
    for name, nbytes in sorted(peak.live.items(), key=lambda entry: -entry[1]):
        if nbytes:
            lines.append(f"  {nbytes / GIB:10.3f} GiB  {name}")
    lines.append(f"  {peak.total / GIB:10.3f} GiB  live")
    lines += _kept(found.memory)
    if not found.device.is_cpu:
        lines.append(
            f"  {found.reserved / GIB:10.3f} GiB  reserved by the allocator"
            f" ({found.reserved_expandable / GIB:.3f} with expandable segments)"
        )
        lines.append(f"  {found.outside_gib:10.3f} GiB  outside of the allocator: CUDA and NCCL (assumed)")
    for name, nbytes in found.host.held.items():
        lines.append(f"  {nbytes / GIB:10.3f} GiB  of host memory: {name}")
    if found.pipeline:
        lines.append("each pipeline rank's peak; what is above is of the fullest:")
    for rank, each in enumerate(found.pipeline):
        stages = ", ".join(map(str, each.stages))
        most = ", the fullest" if each.peak_live == peak.total else ""
        lines.append(f"  {each.peak_live / GIB:10.3f} GiB  rank {rank}: stages {stages}, {each.layers} layers{most}")
    return lines


def _kept(memory: Memory) -> Iterator[str]:
    """What modules keep for backward, most first; those that keep as much as each other in one line."""
    alike: dict[int, list[str]] = {}
    for name, nbytes in memory.saved.items():
        if nbytes and name:
            alike.setdefault(nbytes, []).append(name)
    for nbytes, names in sorted(alike.items(), reverse=True)[:KEPT_LINES]:
        others = f" and each of {len(names) - 1} more" if len(names) > 1 else ""
        yield f"  {nbytes / GIB:10.3f} GiB  kept for backward by {names[0]}{others}"


def _time(found: Estimate, tokens: float | None) -> list[str]:
    compute, phases = found.compute, found.compute.by_phase
    lines = [
        f"time of a step: {compute.seconds:.3f} s, {found.tokens_per_second_per_device:,.0f} tokens/s per device,"
        f" MFU {100 * found.mfu:.1f}%",
        f"  FLOPs per token: {found.flops_per_token:.3e} with what is recomputed,"
        f" {found.formula_flops_per_token:.3e} by 6 N and attention",
        "  of them: " + ", ".join(f"{100 * n / compute.flops:.1f}% {phase}" for phase, n in phases.items() if n),
    ]
    if found.pipeline:
        lines.append(f"  pipeline ranks wait {100 * found.bubble:.1f}% of it, stages being alike")
    lines += [f"  {seconds:10.4f} s    {kind}" for kind, seconds in sorted(compute.by_kind.items())]
    if compute.host_seconds:
        lines.append(f"  {compute.host_seconds:10.4f} s    {found.host.moved / GIB:.3f} GiB to and from host memory")
    for name, axis in compute.communication.items():
        lines.append(f"  {axis.seconds:10.4f} s    {axis.count} collectives over {name}, {axis.nbytes / GIB:.3f} GiB")
    if tokens is not None:
        days = tokens / (found.tokens_per_second_per_device * found.world_size) / 86400
        lines.append(f"  {tokens:.3g} tokens: {days:.2f} days, {days * 24 * found.world_size:,.0f} device hours")
    return lines


def _basis(found: Estimate) -> list[str]:
    fields = Assumptions.model_fields
    lines = ["assumed (--assume NAME=VALUE):"]
    for name, value in found.assumed.model_dump().items():
        said = " ".join((fields[name].description or "").split())
        lines.append(f"  {name}={value:g}: {said}" if said else f"  {name}={value:g}")
    lines.append("not modelled:")
    return [*lines, *(f"  {line}" for line in found.not_modelled)]
