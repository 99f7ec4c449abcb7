"""A model of many equal layers from the trace of a few of them.

The layers are [front] [period] x n [back]. Three periods are traced; the middle one stands for all that are left out,
in forward and in backward, storages included: one that is freed in the next period is freed in the next copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from estimation.ops import Op
from estimation.trace import Alloc, Event, Free, Part, Trace

TRACED = 3
"""Periods that are traced: one behind the front, one between its likes, one before the back."""


@dataclass(frozen=True)
class Periods:
    """Which layers of a model are traced, and which stand for others."""

    n_layers: int
    start: int
    """First layer of the first period."""
    period: int
    """Layers in a period."""
    count: int
    """Periods in the model."""

    @classmethod
    def of(cls, kinds: Sequence[Hashable], multiple_of: int = 1) -> Periods | None:
        """The repetition in `kinds` that leaves most out; None where there is none.

        A period is a multiple of `multiple_of` layers.
        """
        best: Periods | None = None
        for period in range(multiple_of, len(kinds) // TRACED + 1, multiple_of):
            run = 0  # how many layers before this one equal the one a period before them
            for i in range(period, len(kinds)):
                run = run + 1 if kinds[i] == kinds[i - period] else 0
                count = run // period + 1
                found = cls(len(kinds), i + 1 - count * period, period, count)
                if found.left_out > (best.left_out if best else 0):
                    best = found
        return best

    @property
    def copies(self) -> int:
        """Periods that are not traced."""
        return max(0, self.count - TRACED)

    @property
    def left_out(self) -> int:
        """Layers that are not traced."""
        return self.copies * self.period

    @property
    def kept(self) -> list[int]:
        """Numbers of the layers that are traced."""
        gap = range(self.start + 2 * self.period, self.start + 2 * self.period + self.left_out)
        return [number for number in range(self.n_layers) if number not in gap]

    def place(self, number: int) -> tuple[int, int] | None:
        """(traced period from 0, layer in it) of a traced layer; None for the front and the back."""
        offset = self.kept.index(number) - self.start
        period, layer = divmod(offset, self.period)
        return (period, layer) if offset >= 0 and period < TRACED else None


class UnequalPeriodsError(Exception):
    """The traced periods do different things, so that one cannot stand for another."""


Name = tuple[Part, int]
"""A storage: the part that makes it, and how many that part made before."""


def repeated(trace: Trace, periods: Periods, block: str) -> Trace:
    """The trace of the whole model. `block` is the units' name with {} for the layer's number."""
    return _Repetition(trace, periods, {block.format(number): number for number in periods.kept}).run()


class _Repetition:
    def __init__(self, trace: Trace, periods: Periods, numbers: Mapping[str, int]):
        self.trace, self.periods, self.numbers = trace, periods, numbers
        self.named: dict[int, Name] = {}
        self.ids: dict[Hashable, int] = {}
        self.result = Trace()

    def run(self) -> Trace:
        parts = [(part, events) for part, events in self.trace.parts() if events]
        for part, events in parts:
            made = Counter[Part]()
            for event in events:
                if isinstance(event, Alloc) and event.storage not in self.named:
                    self.named[event.storage] = (part, made[part])
                    made[part] += 1
        self._check(parts)
        index = 0
        while index < len(parts):
            part, events = parts[index]
            place = self._place(part)
            if place is None or place[0] != 1:
                self._emit(part, events, 0 if place is None or place[0] == 0 else self.periods.copies)
                index += 1
                continue
            end = index
            while end < len(parts) and (self._place(parts[end][0]) or (0, 0))[0] == 1:
                end += 1
            copies = range(self.periods.copies + 1)
            for copy in copies if part.phase == "forward" else reversed(copies):
                for inner, inner_events in parts[index:end]:
                    self._emit(inner, inner_events, copy)
            index = end
        return self.result

    def _place(self, part: Part) -> tuple[int, int] | None:
        number = self.numbers.get(part.name)
        return None if number is None else self.periods.place(number)

    def _emit(self, part: Part, events: Sequence[Event], shift: int) -> None:
        """`events` of a traced period, `shift` periods further on."""
        self.result.cuts.append((len(self.result.events), self._shifted(part, shift)))
        for event in events:
            if isinstance(event, Op):
                self.result.events.append(event)
            elif isinstance(event, Alloc):
                self.result.events.append(event._replace(storage=self._id(event.storage, part, shift)))
            else:
                self.result.events += (
                    Free(self._id(event.storage, part, each)) for each in self._shifts(event, part, shift)
                )

    def _shifts(self, event: Free, part: Part, shift: int) -> Sequence[int]:
        """What lies outside of all periods, such as the optimizer, frees what each of them has left."""
        name = self.named.get(event.storage)
        home = None if name is None else self._place(name[0])
        everywhere = self._place(part) is None and home is not None and home[0] == 1
        return range(self.periods.copies + 1) if everywhere else [shift]

    def _id(self, storage: int, part: Part, shift: int) -> int:
        """The number of what `storage` stands for to a part that is `shift` periods further on."""
        name = self.named.get(storage)
        key: Hashable = storage
        if name is not None and (home := self._place(name[0])) is not None:
            mine = self._place(part)
            if mine is None:
                position = home[0] + (self.periods.copies if home[0] == TRACED - 1 else shift)
            else:
                position = mine[0] + shift + home[0] - mine[0]
            key = (position, name[0].phase, name[0].visit, home[1], name[1])
        number = self.ids.setdefault(key, len(self.ids))
        if storage in self.trace.roles:
            self.result.roles[number] = self.trace.roles[storage]
        return number

    def _shifted(self, part: Part, shift: int) -> Part:
        place = self._place(part)
        if place is None or not shift:
            return part
        behind = self.numbers[part.name] if place[0] == 1 else self.numbers[part.name] - self.periods.left_out
        return part._replace(
            name=part.name.replace(str(self.numbers[part.name]), str(behind + shift * self.periods.period))
        )

    def _check(self, parts: Sequence[tuple[Part, list[Event]]]) -> None:
        """What a copy looks up in its neighbours must be there: equal storages in equal order."""
        made: dict[tuple[str, int, int, int], list[int]] = {}
        for part, events in parts:
            if (place := self._place(part)) is not None:
                sizes = made.setdefault((part.phase, part.visit, place[1], place[0]), [])
                sizes += [event.nbytes for event in events if isinstance(event, Alloc)]
        for (phase, visit, layer, period), sizes in made.items():
            neighbour = {"forward": 0, "backward": 2}.get(phase)
            if period == 1 and neighbour is not None and made.get((phase, visit, layer, neighbour)) != sizes:
                raise UnequalPeriodsError(f"{phase} {visit} of layer {layer} of a period")
