"""What a rank holds in host memory: offloaded tensors, taken out of the device's trace, batches, and snapshots.

The copies themselves hold nothing on the device but what they bring back; a unit's shards on their way to and from an
optimizer on the host are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from estimation.memory import categories
from estimation.trace import Alloc, Event, Free, Part, Trace
from titan_lite.optim.host import BUCKET
from titan_lite.parallel.offload import AHEAD, SMALLEST

if TYPE_CHECKING:
    from titan_lite.job import Job


@dataclass(frozen=True)
class Host:
    """Bytes of one rank."""

    held: Mapping[str, int]
    """By what it is for."""
    moved: int
    """Over the bus in one step, both ways together."""


@dataclass(frozen=True)
class Placed:
    """A trace of the device alone, and what the host holds."""

    trace: Trace
    host: Host


def placed(trace: Trace, job: Job, rows: int, on_device: bool) -> Placed:
    """Moves to the host what the job keeps there, where device and host are two; `rows` of a rank's step are loaded."""
    held: dict[str, int] = {}
    moved = 0
    at_rest = sum(_at_rest(trace, role) for role in ("parameters", "optimizer state"))
    if on_device:
        for asked, move in (
            (job.training.enable_cpu_offload, _everything),
            (job.training.enable_optimizer_offload, _optimizer_states),
            (job.activation_checkpoint.offload, _activations),
        ):
            if asked:
                trace, found, nbytes = move(trace)
                held |= found
                moved += nbytes
    held["batches"] = _batches(job, rows)
    if job.checkpoint.enable and not job.checkpoint.load_only and job.checkpoint.async_mode != "disabled":
        held["checkpoint snapshot"] = at_rest
    return Placed(trace, Host(held, moved))


def _batches(job: Job, rows: int) -> int:
    """Tokens and targets in int64, documents in int32: the batch in hand, and what workers load ahead."""
    loader = job.training.dataloader
    ahead = (loader.prefetch_factor or 2) if loader.num_workers else 0
    return rows * (20 * job.training.seq_len + 12 * (job.training.seq_len + 1) * ahead)


def _at_rest(trace: Trace, role: str) -> int:
    parts = (events for part, events in trace.parts() if part.phase == "persistent")
    allocations = (event for events in parts for event in events if isinstance(event, Alloc))
    return sum(event.nbytes for event in allocations if trace.roles.get(event.storage) == role)


def _everything(trace: Trace) -> tuple[Trace, dict[str, int], int]:
    """FSDP's offload: the optimizer works on the host, and a gradient leaves as soon as it is reduced."""
    of = categories(trace)
    kept = (_at_rest(trace, role) for role in ("parameters", "optimizer state"))
    parameters, states = kept
    gradients = sum(e.nbytes for e in trace.events if isinstance(e, Alloc) and of[e.storage] == "gradients")

    def rewrite(part: Part, events: list[Event]) -> Iterator[Event]:
        if part.phase == "optimizer":
            return
        leaving = []
        for event in events:
            if isinstance(event, Alloc | Free) and of.get(event.storage) in ("parameters", "optimizer state"):
                continue
            if isinstance(event, Alloc) and of[event.storage] == "gradients":
                leaving.append(Free(event.storage))
            yield event
        yield from leaving

    found = {"parameters": parameters, "gradients": gradients, "optimizer state": states}
    return _rewritten(trace, rewrite), found, 2 * parameters + gradients


def _optimizer_states(trace: Trace) -> tuple[Trace, dict[str, int], int]:
    """A bucket of states at a time is on the device: see `titan_lite.optim.host`."""
    states = {number for number, role in trace.roles.items() if role == "optimizer state"}
    sizes = [event.nbytes for event in trace.events if isinstance(event, Alloc) and event.storage in states]
    bucket = min(sum(sizes), max(BUCKET, 2 * max(sizes, default=0)))
    number = 1 + max((event.storage for event in trace.events if isinstance(event, Alloc)), default=0)

    def rewrite(part: Part, events: list[Event]) -> Iterator[Event]:
        stepping = part.phase == "optimizer" and part.visit == 0 and not part.name
        if stepping and bucket:
            yield Alloc(number, bucket, "to device")
        yield from (e for e in events if not (isinstance(e, Alloc | Free) and e.storage in states))
        if stepping and bucket:
            yield Free(number)

    result = _rewritten(trace, rewrite)
    result.roles[number] = "optimizer state"
    return result, {"optimizer state": sum(sizes)}, 2 * sum(sizes)


def _activations(trace: Trace) -> tuple[Trace, dict[str, int], int]:
    """What the stack keeps leaves when the unit behind the one that made it has run, and is back when backward comes to
    the unit that needs it, or to one behind that which needs one of the `AHEAD` storages that were made next.
    """
    saved = _saved_in_stack(trace)
    needed: dict[str, set[int]] = defaultdict(set)
    for storage, (unit, _) in saved.items():
        needed[unit].add(storage)
    made_by: dict[int, str] = {}
    """Of those on the device."""
    away: list[int] = []

    def rewrite(part: Part, events: list[Event]) -> Iterator[Event]:
        running = part.phase == "forward" and bool(part.name)
        out = {storage for storage, unit in made_by.items() if running and unit != part.name}
        if part.phase == "backward":
            wanted = [place for place, storage in enumerate(away) if storage in needed[part.name]]
            for storage in away[max(0, min(wanted) - AHEAD) :] if wanted else ():
                yield Alloc(storage, saved[storage][1], "to device")
            if wanted:
                del away[max(0, min(wanted) - AHEAD) :]
        for event in events:
            if isinstance(event, Alloc) and event.storage in saved:
                made_by[event.storage] = part.name
            elif isinstance(event, Free) and event.storage in saved:
                made_by.pop(event.storage, None)
                out.discard(event.storage)
            yield event
        for storage in sorted(out):
            yield Free(storage)
            del made_by[storage]
            away.append(storage)

    nbytes = sum(size for _, size in saved.values())
    return _rewritten(trace, rewrite), {"activations": nbytes}, 2 * nbytes


def _saved_in_stack(trace: Trace) -> dict[int, tuple[str, int]]:
    """Storages that the stack's backward frees -> the unit at work then, and bytes."""
    of = categories(trace)
    sizes: dict[int, int] = {}
    saved: dict[int, tuple[str, int]] = {}
    unit = ""
    for part, events in trace.parts():
        if part.phase != "backward":
            unit = ""
        elif part.name.startswith("stack."):
            unit = part.name
        for event in events:
            forward = part.phase == "forward" and bool(part.name)  # not the tables that all units share
            if isinstance(event, Alloc) and forward and of[event.storage] == "activations":
                sizes[event.storage] = event.nbytes
            elif isinstance(event, Free) and unit and sizes.get(event.storage, 0) >= SMALLEST:
                saved[event.storage] = (unit, sizes[event.storage])
    return saved


def _rewritten(trace: Trace, rewrite: Callable[[Part, list[Event]], Iterator[Event]]) -> Trace:
    result = replace(trace, events=[], cuts=[], roles=dict(trace.roles))
    for part, events in trace.parts():
        result.cuts.append((len(result.events), part))
        result.events += rewrite(part, events)
    return result
