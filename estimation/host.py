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
    its unit, or to one behind it that is within `AHEAD` storages.
    """
    of = categories(trace)
    born: dict[int, tuple[str, int]] = {}
    order: dict[str, list[int]] = defaultdict(list)
    index = 0
    for part, events in trace.parts():
        for event in events:
            saved = isinstance(event, Alloc) and of[event.storage] == "activations"
            if saved and part.name.startswith("stack.") and event.nbytes >= SMALLEST:  # type: ignore[union-attr]
                born[event.storage] = (part.name, event.nbytes)  # type: ignore[union-attr]
                order[part.name].append(event.storage)  # type: ignore[union-attr]
            index += 1
    leaving: list[int] = []
    away: list[int] = []

    def rewrite(part: Part, events: list[Event]) -> Iterator[Event]:
        out = list(leaving) if part.phase == "forward" and part.name and part.name not in _names(leaving) else []
        if part.phase == "backward" and (wanted := order.get(part.name)):
            first = min((away.index(s) for s in wanted if s in away), default=len(away))
            for storage in away[max(0, first - AHEAD) :]:
                yield Alloc(storage, born[storage][1], "to device")
                away.remove(storage)
        for event in events:
            if isinstance(event, Free) and event.storage in leaving:
                leaving.remove(event.storage)  # gone before it would have left
                out = [storage for storage in out if storage != event.storage]
            if isinstance(event, Free) and event.storage in away:
                away.remove(event.storage)
                continue
            if isinstance(event, Alloc) and event.storage in born:
                leaving.append(event.storage)
            yield event
        for storage in out:
            yield Free(storage)
            leaving.remove(storage)
            away.append(storage)

    def _names(storages: list[int]) -> set[str]:
        return {born[storage][0] for storage in storages}

    nbytes = sum(size for _, size in born.values())
    return _rewritten(trace, rewrite), {"activations": nbytes}, 2 * nbytes


def _rewritten(trace: Trace, rewrite: Callable[[Part, list[Event]], Iterator[Event]]) -> Trace:
    result = replace(trace, events=[], cuts=[], roles=dict(trace.roles))
    for part, events in trace.parts():
        result.cuts.append((len(result.events), part))
        result.events += rewrite(part, events)
    return result
