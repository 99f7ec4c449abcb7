"""The search for the layout that trains fastest: every legal one, with what backward recomputes and the micro-batch.

For one layout, larger micro-batches and less recomputation never take longer per token in the model of `compute.py`,
and never take less memory. So from the lightest checkpoint mode on, the largest micro-batch that fits is looked for;
a mode that recomputes more is only of use with a larger one. Nor is that estimated which `floors.py` finds too slow
to be among the best. That leaves most combinations out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from estimation.devices import GIB
from estimation.floors import CERTAIN, Degrees, Floors, bubble_of
from estimation.layouts import LOCAL_BATCH, REPLICATE, Layouts
from estimation.question import CONTEXT, EXPERT, PIPELINE, TENSOR, Changes, Outcome, Question, value_at, workers
from estimation.rehearsal import vocabulary
from titan_lite.config.errors import ConfigError
from titan_lite.job import Job
from titan_lite.models.spec import collect_specs
from titan_lite.parallel.precision import Precision

MODE, OPTION = "activation_checkpoint.mode", "activation_checkpoint.selective_ac_option"
NONE: Changes = {MODE: "none"}
OP: Changes = {MODE: "selective", OPTION: "op"}
FULL: Changes = {MODE: "full"}

AT_REST = "weights and optimizer states alone do not fit"
RECOMPUTES = "a mode that recomputes less fits with as large a micro-batch"
SMALLER = "a smaller micro-batch does not fit"
LINE = "on the line through two smaller micro-batches it does not fit"
FEWER = "with fewer replicas, which take less memory, it does not fit"
LARGER = "a larger micro-batch fits"
HEAVIER = "a mode that recomputes more does not fit with as small a micro-batch"
SLOWER = f"slower than {CERTAIN} that fit, by what others take"
"""Why a candidate is not estimated."""

TOGETHER = 4
"""Layouts that are searched without knowing of each other."""


@dataclass
class Plan:
    """What came of a search."""

    question: Question
    own: Outcome | None
    """The config as it is; None where it is refused for so many devices."""
    layouts: int = 0
    """Legal ones that were looked at."""
    left_out: int = 0
    """Legal ones beyond the limit."""
    estimated: list[Outcome] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """Why the config check refuses layouts -> how many."""
    pruned: Counter[str] = field(default_factory=Counter)
    """Why candidates were not estimated -> how many."""
    fixed_batch: bool = True
    """Whether all candidates have the same global batch."""

    @property
    def ranked(self) -> list[Outcome]:
        """Those that fit, by time per token, then memory."""
        fitting = [outcome for outcome in self.estimated if outcome.fits]
        return sorted(fitting, key=lambda outcome: (outcome.seconds_per_token, outcome.reserved_gib))

    @property
    def nearest(self) -> Outcome:
        """The one that comes closest to fitting."""
        return max(self.estimated, key=lambda outcome: outcome.spare_gib)

    def add(self, climb: Climb) -> None:
        """Counts one layout in."""
        self.estimated += climb.outcomes
        self.pruned += climb.pruned
        self.refused += climb.refused


def plan(
    question: Question, fixed: frozenset[str], limit: int, processes: int | None, tell: Callable[[str], None]
) -> Plan:
    """Searches. Keys in `fixed` stay as they are; at most `limit` layouts are looked at; `tell` is told of progress.

    ConfigError with what is wrong with the config, where no layout is legal.
    """
    given = question.given()
    layouts = Layouts(question, given, fixed)
    every = list(layouts)
    own = _own(question)
    if not every:
        question.job({})  # says what is wrong
    found = Plan(question, own, refused=layouts.refused, fixed_batch=given.training.global_batch_size != -1)
    if own is not None:
        found.estimated.append(own)
    modes = _modes(given, fixed)
    climbs = [Climb(question, given, layout, layouts.batches(layout), modes, own) for layout in every]
    fitting = list(_without_those_too_large_at_rest(climbs, found))
    found.layouts, found.left_out = min(len(fitting), limit), max(0, len(fitting) - limit)
    tell(f"{len(every)} legal layouts, {found.layouts} of them to be estimated")
    for number, climb in enumerate(_climbed(fitting[:limit], processes), start=1):
        found.add(climb)
        tell(f"{number} of {found.layouts}: {climb.summary}")
    return found


def _climbed(climbs: Sequence[Climb], processes: int | None) -> Iterator[Climb]:
    """All of them, done. The first by itself, whose layout tells most about others; then `TOGETHER` at a time, each of
    which knows of all that came before: the same in any number of processes.
    """
    if not climbs:
        return
    first, floors = climbs[0].run(), Floors()
    floors.learn_computing(first.known)
    first.teach(floors)
    if first.own is not None and first.own not in first.known.values():
        floors.learn_of(first.own)
    done = [first]
    yield first
    with workers(processes, len(climbs) - 1) as each:
        for start in range(1, len(climbs), TOGETHER):
            wave = climbs[start : start + TOGETHER]
            for climb in wave:
                climb.floors, climb.tight = deepcopy(floors), not first.fits_at_once
                climb.of_fewer = [other.facts for other in done if other.family == climb.family]
            for climb in each(Climb.run, wave):
                climb.teach(floors)
                done.append(climb)
                yield climb


def _own(question: Question) -> Outcome | None:
    try:
        return question.answer({})
    except ConfigError:  # its own layout may not be one of so many devices
        return None


def _modes(given: Job, fixed: frozenset[str]) -> list[Changes]:
    """What backward may recompute, least first: nothing, parts of blocks, blocks."""
    if MODE in fixed:
        return [{}]
    own = {key: value_at(given, key) for key in (MODE, OPTION)}
    parts = [OP] if own[MODE] in ("none", "full") or own == OP else [OP, own]
    return [NONE, *parts, FULL]


def _without_those_too_large_at_rest(climbs: Sequence[Climb], found: Plan) -> Iterator[Climb]:
    """What rests between steps is at least a rank's even share of it; each replica has all of it."""
    bound = _bytes_at_rest(climbs, found) if climbs else 0.0
    for climb in climbs:
        climb.rest_gib = bound * climb.replicas / found.question.world_size / GIB
        if climb.rest_gib > found.question.device.memory_gib:
            found.pruned[AT_REST] += len(climb.modes) * len(climb.batches)
        else:
            yield climb


def _bytes_at_rest(climbs: Sequence[Climb], found: Plan) -> float:
    """Of parameters and optimizer states, over all ranks of a replica; the states' share is that of an estimate."""
    example = found.own or climbs[0].example()
    parameters, states = example.rest_gib
    if not parameters:  # they rest in host memory
        return 0.0
    with torch.device("meta"):
        model = climbs[0].given.model.build(vocab_size=vocabulary(climbs[0].given))
    Precision.of(climbs[0].given, torch.device("cpu")).store(model, collect_specs(model))
    return sum(parameter.nbytes for parameter in model.parameters()) * (1 + states / parameters)


class Facts(NamedTuple):
    """Of a search within a layout that is done."""

    rest_gib: float
    known: Mapping[tuple[int, int], Outcome]


@dataclass
class Climb:
    """The search within one layout."""

    question: Question
    given: Job
    layout: Changes
    batches: list[Changes]
    modes: list[Changes]
    own: Outcome | None
    rest_gib: float = 0.0
    """A bound of what weights and optimizer states take."""
    floors: Floors = field(default_factory=Floors)
    """What is known at its beginning, and what it learns."""
    tight: bool = False
    """Whether the lightest mode is likely not to fit: then heavy ones come first, which may rule out all others."""
    of_fewer: Sequence[Facts] = ()
    """Of the same with fewer replicas: it takes less memory, at least by what rests."""
    outcomes: list[Outcome] = field(default_factory=list)
    pruned: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    known: dict[tuple[int, int], Outcome] = field(default_factory=dict)
    """(number of the mode, micro-batch) -> what came of it."""

    @property
    def facts(self) -> Facts:
        """What others want to know of it."""
        return Facts(self.rest_gib, self.known)

    @property
    def fits_at_once(self) -> bool:
        """Whether the smallest micro-batch fits in the lightest mode."""
        return any(mode == 0 and outcome.fits for (mode, _), outcome in self.known.items())

    @property
    def replicas(self) -> int:
        """Groups of ranks with all of the weights."""
        return self._degree(REPLICATE)

    @property
    def degrees(self) -> Degrees:
        """Over how many ranks a sequence's work is spread."""
        return tuple(map(self._degree, (TENSOR, CONTEXT, PIPELINE, EXPERT)))

    @property
    def family(self) -> Changes:
        """What layouts that differ in replicas have in common."""
        return {key: value for key, value in self.layout.items() if key != REPLICATE}

    @property
    def summary(self) -> str:
        """A line for people who wait."""
        best = min((outcome.step_seconds for outcome in self.outcomes if outcome.fits), default=None)
        said = "none fits" if best is None else f"steps from {best:.3f} s on"
        return f"{self.outcomes[0].layout}: {len(self.outcomes)} estimates, {said}" if self.outcomes else "left out"

    def example(self) -> Outcome:
        """The first candidate."""
        return self.question.answer({**self.layout, **self.batches[0]})

    def teach(self, floors: Floors) -> None:
        """Hands on what its estimates tell about other layouts."""
        for (mode, _), outcome in self.known.items():
            floors.learn(mode, self.degrees, outcome)

    def run(self) -> Climb:
        """Estimates what cannot be left out."""
        largest: list[int] = []
        lightest = self._lightest_that_may_fit() if self.tight else 0
        for number in range(len(self.modes)):
            if number < lightest:
                self.pruned[HEAVIER] += sum((number, self._size(batch)) not in self.known for batch in self.batches)
                continue
            lighter = largest[:1] if number < len(self.modes) - 1 else largest  # of parts of blocks none is the lighter
            useful = [batch for batch in self.batches if self._size(batch) > max(lighter, default=0)]
            self.pruned[RECOMPUTES] += len(self.batches) - len(useful)
            largest.append(self._largest(number, useful))
        return self

    def _lightest_that_may_fit(self) -> int:
        """The number of a mode; that behind the last where none fits with the smallest micro-batch."""
        last, batch = len(self.modes) - 1, self.batches[0]
        for number in range(last, 0, -1):
            if self._too_large(number, {}, self._size(batch)) or self._too_slow(number, batch):
                return 0
            outcome = self._answer(number, batch)
            if outcome is not None and outcome.fits is False:
                return last + 1 if number == last else 1  # the lightest is lighter than each, and the last heavier
        return 0

    def _degree(self, key: str) -> int:
        return int(self.layout.get(key, value_at(self.given, key)))

    def _size(self, batch: Changes) -> int:
        return int(batch.get(LOCAL_BATCH, self.given.training.local_batch_size))

    def _largest(self, number: int, batches: Sequence[Changes]) -> int:
        """The largest micro-batch that fits in a mode; 0 where none does."""
        best = 0
        known: dict[int, Outcome] = {}
        while batches:
            left = []
            for batch in batches:
                why = self._too_large(number, known, self._size(batch)) or self._too_slow(number, batch)
                self.pruned[why] += bool(why)
                left += [] if why else [batch]
            if not left:
                break
            batch = left[0] if len(known) < 2 else left[-1]
            size = self._size(batch)
            outcome = self._answer(number, batch)
            smaller = [other for other in left if self._size(other) < size]
            larger = [other for other in left if self._size(other) > size]
            if outcome is None:
                batches = smaller + larger
                continue
            known[size] = outcome
            if outcome.fits:
                best = size
            self.pruned[LARGER if outcome.fits else SMALLER] += len(smaller if outcome.fits else larger)
            batches = larger if outcome.fits else smaller
        return best

    def _too_large(self, number: int, known: Mapping[int, Outcome], size: int) -> str:
        """Why a micro-batch cannot fit; nothing where it may."""
        below = sorted(n for n in known if n < size)[-2:]
        if len(below) == 2:
            # Live bytes are sums of parts that grow evenly, of which the largest counts: never below such a line.
            (n, first), (m, second) = ((n, known[n]) for n in below)
            slope = (second.live_gib - first.live_gib) / (m - n)
            if second.live_gib + slope * (size - m) > second.limit_gib:
                return LINE
        live = (
            outcome.live_gib + self.rest_gib - fewer.rest_gib
            for fewer in self.of_fewer
            for (mode, n), outcome in fewer.known.items()
            if mode == number and n <= size
        )
        return FEWER if max(live, default=0.0) > self.question.device.memory_gib else ""

    def _too_slow(self, number: int, batch: Changes) -> str:
        """Why a micro-batch cannot be among the fastest; nothing where it may."""
        if not self.floors.full:
            return ""
        try:
            bubble = bubble_of(self.question, {**self.layout, **batch}) if self.degrees[2] > 1 else 0.0
        except ConfigError:
            return ""
        return SLOWER if self.floors.rule_out(number, self.degrees, bubble) else ""

    def _answer(self, number: int, batch: Changes) -> Outcome | None:
        """None where the config check refuses it."""
        place = (number, self._size(batch))
        if place in self.known:
            return self.known[place]
        changes = {**self.layout, **self.modes[number], **batch}
        changes = {key: value for key, value in changes.items() if value_at(self.given, key) != value}
        if not changes and self.own is not None:
            outcome = self.own
        else:
            try:
                outcome = self.question.answer(changes)
            except ConfigError as error:
                problem = error.problems[0]
                self.refused[f"{problem.key}: {problem.why}"] += 1
                return None
            self.outcomes.append(outcome)
        self.known[place] = outcome
        self.floors.learn(number, self.degrees, outcome)
        return outcome
