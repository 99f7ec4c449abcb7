"""Pipeline schedules: which stage computes what in which order, and how long ranks wait in between.

Names and orders are those of `torch.distributed.pipelining`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple


class Kind(NamedTuple):
    """A schedule, as far as it decides what layouts there can be."""

    stages: Literal["one", "two", "several"]
    """On each rank."""
    fits: Callable[[int, int], bool]
    """Whether it can be made of so many micro-batches for so many ranks."""
    rule: str = ""
    """The same in words, behind "the number of micro-batches"."""
    vee: bool = False
    """Rank r has stages r and 2 P - 1 - r, where others have r, r + P, ..."""
    splits: bool = False
    """Whether backward is split into that of inputs and that of weights."""


def _any(n: int, ranks: int) -> bool:
    return True


def _in_rounds(n: int, ranks: int) -> bool:
    return n % max(1, n // ranks) == 0


_ROUNDS: Final = "must be a multiple of the rounds of one micro-batch per rank that are in it (n % (n // ranks) = 0)"

KINDS: Final[Mapping[str, Kind]] = {
    "GPipe": Kind("one", _any),
    "1F1B": Kind("one", lambda n, ranks: n >= ranks, "must be at least the number of stages"),
    "Interleaved1F1B": Kind("several", _in_rounds, _ROUNDS),
    "InterleavedZeroBubble": Kind("several", _in_rounds, _ROUNDS, splits=True),
    "LoopedBFS": Kind("several", _any),
    "ZBVZeroBubble": Kind("two", _any, vee=True, splits=True),
    "DualPipeV": Kind(
        "two", lambda n, ranks: n >= 2 * ranks, "must be at least the number of stages", vee=True, splits=True
    ),
}
"""Sources: GPipe arXiv 1811.06965; 1F1B 1806.03377; Interleaved1F1B 2104.04473; InterleavedZeroBubble 2401.10241;
LoopedBFS 2211.05953; ZBVZeroBubble 2401.10241, section 6; DualPipeV 2412.19437 and github.com/deepseek-ai/DualPipe."""


class Work(NamedTuple):
    """One thing that a rank computes: F forward, B backward, I backward of inputs, W backward of weights."""

    stage: int
    what: str
    micro_batch: int


@dataclass(frozen=True)
class Table:
    """What each rank computes, in order."""

    ranks: Sequence[Sequence[Work]]
    n_stages: int

    @property
    def rank_of(self) -> list[int]:
        """The rank of each stage."""
        found = {work.stage: rank for rank, works in enumerate(self.ranks) for work in works}
        return [found[stage] for stage in range(self.n_stages)]

    @property
    def n_micro_batches(self) -> int:
        """How many go through."""
        return 1 + max(work.micro_batch for works in self.ranks for work in works)

    @property
    def splits(self) -> bool:
        """Whether any backward is split."""
        return any(work.what == "I" for works in self.ranks for work in works)


def table_of(name: str, n_ranks: int, stages_per_rank: int, n_micro_batches: int) -> Table:
    """The table of a schedule of `KINDS`, as torch makes it."""
    if name == "1F1B":
        # Not torch's own table: its last rank begins with micro-batch 1 (2.13), which is not what torch runs.
        return Table([_one_by_one(rank, n_ranks, n_micro_batches) for rank in range(n_ranks)], n_ranks)
    from torch.distributed.pipelining.schedules import get_schedule_class  # slow

    n_stages = n_ranks * stages_per_rank
    # A schedule asks its stages for nothing else while it makes the table.
    stages: list[Any] = [
        SimpleNamespace(num_stages=n_stages, group_size=n_ranks, group_rank=0, stage_index=0, submod=None)
        for _ in range(stages_per_rank)
    ]
    schedule: Any = get_schedule_class(name)
    made = schedule(stages[0] if KINDS[name].stages == "one" else stages, n_micro_batches)
    return table_from(made.pipeline_order, n_stages)


def _one_by_one(rank: int, n_ranks: int, n: int) -> list[Work]:
    ahead = min(n, n_ranks - rank)
    works = [Work(rank, "F", i) for i in range(ahead)]
    for i in range(n):
        works.append(Work(rank, "B", i))
        works += [Work(rank, "F", i + ahead)] if i + ahead < n else []
    return works


def table_from(actions: Mapping[int, Sequence[Any]], n_stages: int) -> Table:
    """From torch's actions of each rank; idle slots are left out."""
    ranks = [[work for action in actions[rank] if action is not None for work in _works(action)] for rank in actions]
    return Table(ranks, n_stages)


def _works(action: Any) -> list[Work]:
    parts = action.sub_actions or (action,)
    found = [Work(part.stage_index, part.computation_type.value, part.microbatch_index) for part in parts]
    return [work for work in found if work.what in {"F", "B", "I", "W"}]


class Times(NamedTuple):
    """How long a stage's work on a micro-batch takes; B takes `inputs` + `weights`."""

    forward: float = 1.0
    inputs: float = 1.0
    weights: float = 1.0

    def of(self, what: str) -> float:
        """The time of one kind of work."""
        parts = {"F": self.forward, "B": self.inputs + self.weights, "I": self.inputs, "W": self.weights}
        return parts[what]


ALIKE: Final = Times()


class Span(NamedTuple):
    """How long a run of the schedule takes, and how much of that each rank works."""

    total: float
    busy: list[float]

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait for others."""
        return 1 - sum(self.busy) / (len(self.busy) * self.total)


def timeline(table: Table, times: Callable[[int], Times] = lambda stage: ALIKE) -> Span:
    """Runs the table with work of these times for each stage, and sends that take none.

    A rank does its work in order, each as soon as what it needs is there. Raises ValueError where ranks would wait for
    each other forever.
    """
    done: dict[Work, float] = {}
    now, busy, following = [0.0] * len(table.ranks), [0.0] * len(table.ranks), [0] * len(table.ranks)
    left = sum(map(len, table.ranks))
    while left:
        before = left
        for rank, works in enumerate(table.ranks):
            while following[rank] < len(works):
                work = works[following[rank]]
                ready = _ready(work, done, table.n_stages)
                if ready is None:
                    break
                took = times(work.stage).of(work.what)
                done[work] = now[rank] = max(now[rank], ready) + took
                busy[rank] += took
                following[rank] += 1
                left -= 1
        if left == before:
            stuck = [str(works[i]) for works, i in zip(table.ranks, following, strict=True) if i < len(works)]
            raise ValueError(f"ranks wait for each other at {', '.join(stuck)}")
    return Span(max(now), busy)


def _ready(work: Work, done: Mapping[Work, float], n_stages: int) -> float | None:
    """When what the work needs is there; None while that is not known."""
    stage, what, n = work
    if what == "F":
        return done.get(Work(stage - 1, "F", n)) if stage else 0.0
    if what == "W":
        return done.get(Work(stage, "I", n))
    own = done.get(Work(stage, "F", n))
    if stage == n_stages - 1 or own is None:
        return own
    behind = [done[one] for kind in "BI" if (one := Work(stage + 1, kind, n)) in done]
    return max(own, *behind) if behind else None


def bubble_fraction(name: str, n_ranks: int, stages_per_rank: int, n_micro_batches: int, times: Times = ALIKE) -> float:
    """The share of all ranks' time in which they wait for others, stages being alike."""
    return timeline(table_of(name, n_ranks, stages_per_rank, n_micro_batches), lambda stage: times).bubble
