"""Covering arrays: few rows in which every pair of levels appears that can appear at all.

Greedy: each row starts from a pair that is still missing and takes, one after the other, the level that makes the most
missing pairs. What cannot be together is not known beforehand: a row that turns out to be refused teaches a set of
settings that no row may have (a "nogood"), and the search goes on without it. Unlike the usual generators it is
complete: a pair that is in no row has been shown to be in no legal one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from operator import or_

from tests.combinations.factors import ABSENT, Factor, Row

Setting = tuple[str, str]
"""(factor, level)."""
Nogood = frozenset[Setting]
Pair = tuple[Setting, Setting]


class Covering:
    """The search and its result. Sets of settings are integers, a bit for each setting."""

    def __init__(self, factors: Mapping[str, Factor], refused: Callable[[Row], Iterable[Nogood]]):
        """`refused` says what is wrong with a whole row; nothing where it is legal."""
        self.refused = refused
        self.rows: list[dict[str, str]] = []
        self.nogoods: set[Nogood] = set()
        self.impossible: list[Pair] = []
        """Pairs that are in no legal row."""
        levels = {key: [level.name for level in factor.levels] for key, factor in factors.items()}
        for key, factor in factors.items():
            levels[key] += [ABSENT] * bool(factor.around)
        self.settings = [(key, name) for key, names in levels.items() for name in names]
        self.bit = {setting: 1 << i for i, setting in enumerate(self.settings)}
        self.domain = {key: self._mask((key, name) for name in names) for key, names in levels.items()}
        self.fits = {self.bit[key, name]: ~(self.domain[key] ^ self.bit[key, name]) for key, name in self.settings}
        """Setting -> what it can be together with."""
        for factor in factors.values():
            for level in factor.levels if factor.around else ():
                self._forbid((factor.key, level.name), factor.around, lambda name, needs=level.needs: name not in needs)
            if factor.around:
                self._forbid((factor.key, ABSENT), factor.around, lambda name, having=factor.having: name in having)
        self.around = {
            self.bit[key, name]: self.domain[factor.around] & self.fits[self.bit[key, name]]
            for key, factor in factors.items()
            for name in (levels[key] if factor.around else ())
        }
        """Setting in the table of a slot -> the slot's levels that have it."""
        self.larger: list[int] = []
        """Nogoods of more than two settings."""
        self.missing = dict.fromkeys(self.fits, 0)

    def run(self, wanted: Callable[[Setting, Setting], bool] = lambda one, other: True, limit: int = 0) -> Covering:
        """Covers the pairs that are `wanted`; with a limit, as many as the first rows can have."""
        real = [setting for setting in self.settings if setting[1] != ABSENT]
        pairs = [(one, other) for one, other in itertools.combinations(real, 2) if one[0] != other[0]]
        for one, other in pairs:
            if wanted(one, other):
                self.missing[self.bit[one]] |= self.bit[other]
                self.missing[self.bit[other]] |= self.bit[one]
        while any(self.missing.values()) and not 0 < limit <= len(self.rows):
            one = max(self.missing, key=self._count)
            other = max(_bits(self.missing[one]), key=self._count)
            self._cover((self.settings[one.bit_length() - 1], self.settings[other.bit_length() - 1]))
        return self

    def _count(self, bit: int) -> int:
        return self.missing[bit].bit_count()

    def _mask(self, settings: Iterable[Setting]) -> int:
        return reduce(or_, (self.bit[setting] for setting in settings), 0)

    def _forbid(self, setting: Setting, factor: str, when: Callable[[str], bool]) -> None:
        for other in self.settings:
            if other[0] == factor and when(other[1]):
                self.fits[self.bit[setting]] &= ~self.bit[other]
                self.fits[self.bit[other]] &= ~self.bit[setting]

    def _cover(self, pair: Pair) -> None:
        """Adds a row with the pair, or shows that there is none, or learns why the best one is refused."""
        allowed = self._consistent(pair)
        found = self._filled(allowed, [self.bit[setting] for setting in pair]) if allowed else 0
        if not found:
            self.impossible.append(pair)
            self._strike(pair)
            return
        row = {key: name for key, name in self.settings if self.bit[key, name] & found}
        nogoods = list(self.refused(row))
        for nogood in nogoods:
            assert nogood <= row.items(), nogood
            self._learn(nogood)
        if not nogoods:
            self.rows.append(row)
            for covered in itertools.combinations(row.items(), 2):
                self._strike(covered)

    def _strike(self, pair: Pair) -> None:
        one, other = (self.bit[setting] for setting in pair)
        self.missing[one] &= ~other
        self.missing[other] &= ~one

    def _learn(self, nogood: Nogood) -> None:
        self.nogoods.add(nogood)
        bits = [self.bit[setting] for setting in nogood]
        if len(bits) == 1:
            self.domain = {key: mask & ~bits[0] for key, mask in self.domain.items()}
        elif len(bits) == 2:
            self.fits[bits[0]] &= ~bits[1]
            self.fits[bits[1]] &= ~bits[0]
        else:
            self.larger.append(sum(bits))

    def _filled(self, allowed: int, chosen: Iterable[int]) -> int:
        """A whole row out of the settings `allowed`, with those `chosen`; 0 where there is none."""
        for bit in chosen:
            allowed = self._narrowed(allowed & self.fits[bit]) if allowed & bit else 0
        if not allowed:
            return 0
        free = [mask for domain in self.domain.values() if (mask := domain & allowed).bit_count() > 1]
        if not free:
            return allowed
        row = sum(mask for domain in self.domain.values() if (mask := domain & allowed).bit_count() == 1)

        def gain(bit: int) -> tuple[int, int]:
            return (self.missing[bit] & row).bit_count(), (self.missing[bit] & allowed).bit_count()

        best = {mask: max(_bits(mask), key=gain) for mask in free}
        first = max(free, key=lambda mask: gain(best[mask]))
        for bit in sorted(_bits(first), key=gain, reverse=True):
            if found := self._filled(allowed, [bit]):
                return found
        return 0

    def _consistent(self, pair: Pair) -> int:
        """Settings that may be in a row with the pair: each factor has one that fits to each of them; 0 for no row.

        A search would find that out too, but only behind all choices for factors that have nothing to do with it.
        """
        allowed = (1 << len(self.settings)) - 1
        for setting in pair:
            allowed &= self.fits[self.bit[setting]]
        before = 0
        while allowed != before:
            before = allowed = self._narrowed(allowed)
            for bit in _bits(allowed):
                both = allowed & self.fits[bit]
                if not all(both & domain for domain in self.domain.values()):
                    allowed &= ~bit
        return allowed

    def _narrowed(self, allowed: int) -> int:
        """What is still possible, once each factor with one level left has it; 0 where one has none left."""
        before = -1
        while allowed != before:
            before = allowed
            for bit, slots in self.around.items():
                if allowed & bit and not allowed & slots:
                    allowed &= ~bit
            for domain in self.domain.values():
                mask = domain & allowed
                if not mask:
                    return 0
                if mask & (mask - 1) == 0:
                    allowed &= self.fits[mask]
            forced = sum(mask for domain in self.domain.values() if (mask := domain & allowed).bit_count() == 1)
            for nogood in self.larger:
                if (left := nogood & ~forced).bit_count() < 2:
                    allowed &= ~left if left else 0
        return allowed


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield mask & -mask
        mask &= mask - 1
