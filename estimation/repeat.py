"""A model of many equal layers from the trace of a few of them.

The layers are [front] [period] x n [back]. Five periods are traced; the middle one stands for all that are left out,
in forward and in backward, storages included: one that is freed a period later is freed in the next copy. That reaches
two periods far: FSDP frees what it gathered a unit ahead when it waits for the unit after that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from estimation.ops import Op
from estimation.trace import Alloc, Event, Free, Part, Trace

TRACED, MIDDLE = 5, 2
"""Periods that are traced, and the one among them, from 0, that stands for others."""


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
        begin = self.start + (MIDDLE + 1) * self.period
        gap = range(begin, begin + self.left_out)
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


def repeated(trace: Trace, periods: Periods, numbers: Mapping[str, int]) -> Trace:
    """The trace of the whole model. `numbers`: name of a traced layer's unit -> its number in the whole model."""
    return _Repetition(trace, periods, numbers).run()


class _Repetition:
    def __init__(self, trace: Trace, periods: Periods, numbers: Mapping[str, int]):
        self.trace, self.periods, self.numbers = trace, periods, numbers
        self.named: dict[int, Name] = {}
        self.ids: dict[Hashable, int] = {}
        self.growth = 1.0
        """Bytes that rest in the whole model over those of the traced one."""
        self.result = Trace()

    def run(self) -> Trace:
        parts = [(part, events) for part, events in self.trace.parts() if events]
        self._name(parts)
        self._check(parts)
        index = before = 0
        while index < len(parts):
            part, events = parts[index]
            place = self._place(part)
            if place is None or place[0] != MIDDLE:
                before = before if place is None else place[0]
                self._emit(part, events, 0 if place is None or place[0] < MIDDLE else self.periods.copies)
                index += 1
                continue
            end = index
            while end < len(parts) and (self._place(parts[end][0]) or (0, 0))[0] == MIDDLE:
                end += 1
            copies = range(self.periods.copies + 1)
            for copy in copies if before < MIDDLE else reversed(copies):
                for inner, inner_events in parts[index:end]:
                    self._emit(inner, inner_events, copy)
            index = end
        return self.result

    def _name(self, parts: Sequence[tuple[Part, list[Event]]]) -> None:
        for part, events in parts:
            made = Counter[Part]()
            for event in events:
                if isinstance(event, Alloc) and event.storage not in self.named:
                    origin = self.named.get(event.like)
                    if self._place(part) is None and origin is not None and self._place(origin[0]) is not None:
                        home = part._replace(name=origin[0].name)  # as many as there are of what it is made of
                    else:
                        home = part
                    self.named[event.storage] = (home, made[home])
                    made[home] += 1
        persistent = [(part, events) for part, events in parts if part.phase == "persistent"]
        traced = whole = 0
        for part, events in persistent:
            nbytes = sum(event.nbytes for event in events if isinstance(event, Alloc))
            place = self._place(part)
            traced += nbytes
            whole += nbytes * (1 if place is None or place[0] != MIDDLE else 1 + self.periods.copies)
        self.growth = whole / max(traced, 1)

    def _place(self, part: Part) -> tuple[int, int] | None:
        number = self.numbers.get(part.name)
        return None if number is None else self.periods.place(number)

    def _emit(self, part: Part, events: Sequence[Event], shift: int) -> None:
        """`events` of a traced period, `shift` periods further on."""
        self.result.cuts.append((len(self.result.events), self._shifted(part, shift)))
        for event in events:
            if isinstance(event, Op):
                of_all = part.phase == "optimizer" or event.name.startswith("_foreach_")
                grows = of_all and event.kind != "collective" and self._place(part) is None
                self.result.events.append(event._replace(nbytes=round(event.nbytes * self.growth)) if grows else event)
                continue
            for each in self._shifts(event, part, shift):
                self.result.events.append(event._replace(storage=self._id(event.storage, part, each)))

    def _shifts(self, event: Alloc | Free, part: Part, shift: int) -> Sequence[int]:
        """What lies outside of all periods, such as the optimizer, makes something of, or frees, what each has left."""
        name = self.named.get(event.storage)
        home = None if name is None else self._place(name[0])
        everywhere = self._place(part) is None and home is not None and home[0] == MIDDLE
        return range(self.periods.copies + 1) if everywhere else [shift]

    def _id(self, storage: int, part: Part, shift: int) -> int:
        """The number of what `storage` stands for to a part that is `shift` periods further on."""
        name = self.named.get(storage)
        key: Hashable = storage
        if name is not None and (home := self._place(name[0])) is not None:
            behind = self._place(part) is None and home[0] > MIDDLE
            position = home[0] + (self.periods.copies if behind else shift)
            key = (position, name[0].phase, name[0].visit, home[1], name[1])
        number = self.ids.setdefault(key, len(self.ids))
        if storage in self.trace.roles:
            self.result.roles[number] = self.trace.roles[storage]
        return number

    def _shifted(self, part: Part, shift: int) -> Part:
        place = self._place(part)
        if place is None or not shift:
            return part
        number = self.numbers[part.name] + (shift * self.periods.period if place[0] == MIDDLE else 0)
        return part._replace(name=f"{part.name.rpartition('.')[0]}.{number}")

    def _check(self, parts: Sequence[tuple[Part, list[Event]]]) -> None:
        """What a copy looks up in its neighbours must be there: equal storages in equal order."""
        made: dict[tuple[str, int, int, int], list[int]] = {}
        for part, events in parts:
            if (place := self._place(part)) is not None:
                sizes = made.setdefault((part.phase, part.visit, place[1], place[0]), [])
                sizes += [event.nbytes for event in events if isinstance(event, Alloc)]
        for (phase, visit, layer, period), sizes in made.items():
            neighbours = (MIDDLE - 1, MIDDLE + 1) if phase in ("persistent", "forward", "backward") else ()
            for neighbour in neighbours if period == MIDDLE else ():
                if made.get((phase, visit, layer, neighbour)) != sizes:
                    raise UnequalPeriodsError(f"{phase} {visit} of layer {layer} of a period")
