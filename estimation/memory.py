"""The memory of one step over time: what is live, and what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from estimation.trace import Alloc, Free, Part, Trace

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer state",
    "unsharded parameters",
    "activations",
    "loss",
    "communication",
    "memory",
    "temporaries",
)
"""parameters, gradients and optimizer state as they rest; unsharded parameters as gathered for use; activations: what
forward keeps for backward; loss: what the head and the loss make; communication: what goes through collectives; memory:
what rows remember of steps before; temporaries: all else."""


@dataclass(frozen=True)
class Moment:
    """What is live at one time, in bytes."""

    part: Part
    event: int
    """Index in the trace."""
    live: Mapping[str, int]
    """By category."""

    @property
    def total(self) -> int:
        return sum(self.live.values())


@dataclass(frozen=True)
class Memory:
    """A step's memory."""

    peak: Moment
    timeline: tuple[Moment, ...]
    """The fullest moment of each part, in order."""
    saved: Mapping[str, int]
    """Unit -> bytes that its forward leaves live when the first backward begins."""


def memory_of(trace: Trace, head: str = "head") -> Memory:
    """Follows a whole step, which begins with the part `persistent`. `head` is the unit that makes the loss."""
    category = categories(trace, head)
    live: Counter[str] = Counter()
    held: dict[int, tuple[int, Part]] = {}
    total = 0
    timeline: list[Moment] = []
    saved: Counter[str] = Counter()
    counted = False
    index = 0
    for part, events in trace.parts():
        if part.phase == "backward" and not counted:
            counted = True
            for storage, (nbytes, born) in held.items():
                if category[storage] in ("activations", "loss"):
                    saved[born.name] += nbytes
        highest, at, then = total, index, dict(live)
        for event in events:
            if isinstance(event, Alloc):
                held[event.storage] = (event.nbytes, part)
                live[category[event.storage]] += event.nbytes
                total += event.nbytes
                if total > highest:
                    highest, at, then = total, index, dict(live)
            elif isinstance(event, Free) and event.storage in held:
                nbytes, _ = held.pop(event.storage)
                live[category[event.storage]] -= nbytes
                total -= nbytes
            index += 1
        if events and part.phase != "persistent":
            timeline.append(Moment(part, at, then))
    return Memory(max(timeline, key=lambda moment: moment.total), tuple(timeline), saved)


def categories(trace: Trace, head: str = "head") -> dict[int, str]:
    """What each storage is, from where it is born and when it dies."""
    born: dict[int, Part] = {}
    phases: dict[int, set[str]] = {}
    alive: set[int] = set()
    category: dict[int, str] = {}
    for part, events in trace.parts():
        if part.phase == "optimizer":
            for storage in alive:
                if born[storage].phase == "backward":
                    category.setdefault(storage, "gradients")
        for event in events:
            if isinstance(event, Alloc):
                born.setdefault(event.storage, part)
                alive.add(event.storage)
            elif isinstance(event, Free):
                alive.discard(event.storage)
                phases.setdefault(event.storage, set()).add(part.phase)
    for storage, part in born.items():
        if storage in category:
            continue
        if storage in trace.roles:
            category[storage] = trace.roles[storage]
        elif part.name == head:
            category[storage] = "loss"
        elif part.phase == "forward" and "backward" in phases.get(storage, ()):
            category[storage] = "activations"
        else:
            category[storage] = "temporaries"
    return category
