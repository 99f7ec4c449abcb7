"""Which Hugging Face architecture a model is, and how its tensors become that one's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from titan_lite.config.errors import ConfigError
from titan_lite.hf import ARCHITECTURES, Architecture
from titan_lite.hf.folds import FOLDS, Fold, Shape
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.hf.source import Image, Meta, Source, chosen


@dataclass(frozen=True)
class Unloaded:
    """What a folder holds and transformers' class does not have."""

    names: frozenset[str]
    """As transformers tells of them."""
    tensors: Source
    """Under their names in the folder."""


@dataclass(frozen=True)
class Native:
    """A published architecture that computes what the model computes, once `folds` are in its weights."""

    architecture: Architecture
    settings: Tables
    folds: tuple[Fold, ...]
    rules: tuple[list[Rule], ...]
    """One list for each fold, and the architecture's, which has no rule for buffers that only training reads."""
    beside: list[Rule]
    """Those of tensors that transformers' class does not have."""
    copies: Mapping[str, str]
    """Published tensors that repeat another one: its name by theirs."""

    @property
    def exact(self) -> bool:
        """Whether no weight was computed for a fold."""
        return all(fold.lossless for fold in self.folds)

    def size(self, shape: Shape) -> int:
        """Numbers in the weights."""
        return sum(meta.numel() for meta in self.loaded(Meta(shape.meta)).meta.values())

    def loaded(self, ours: Source) -> Source:
        """Their tensors under the names of transformers' modules. KeyError where one of ours is missing."""
        return Image(self.rules[-1], self._folded(ours))

    def tensors(self, ours: Source) -> Source:
        """Those and what else their files hold, under the published names."""
        published = self.architecture.files.published(Image([*self.rules[-1], *self.beside], self._folded(ours)))
        return chosen(published, published.meta, self.copies)

    def unloaded(self, ours: Source) -> Unloaded:
        """What else their files hold."""
        tensors, loaded = self.tensors(ours), self.architecture.files.published(self.loaded(ours)).meta
        names = frozenset((*self.copies, *(name for rule in self.beside for name in rule.theirs)))
        return Unloaded(names, chosen(tensors, [name for name in tensors.meta if name not in loaded]))

    def _folded(self, ours: Source) -> Source:
        source = ours
        for rules in self.rules[:-1]:
            source = Image(rules, source)
        return source


def natives(shape: Shape, preferred: str = "") -> Iterator[Native]:
    """The architectures that the model is, the best one first: that which needs the fewest folds.

    Of several it is `preferred` (a model_type, or how one begins), then the one with the fewest numbers, so that none
    are made up, then the first in the registry.
    """
    variants = list(_variants(shape))
    for count in sorted({len(folds) for folds, *_ in variants}):
        found = [native for variant in variants if len(variant[0]) == count for native in _natives(shape, *variant)]
        yield from sorted(found, key=lambda native: (not _is(native, preferred), native.size(shape)))


def _is(native: Native, preferred: str) -> bool:
    return bool(preferred) and native.architecture.model_type.startswith(preferred)


def _natives(shape: Shape, folds: tuple[Fold, ...], folded: Shape, rules: list[list[Rule]]) -> Iterator[Native]:
    """The architectures that a folded model is."""
    for architecture in ARCHITECTURES.values():
        try:
            settings = architecture.settings(folded.config, shape.vocab_size, shape.context_len)
        except ConfigError:
            continue
        own, beside = architecture.rules(folded.config), architecture.beside(folded.config)
        if _ours([*own, *beside]) >= folded.parameters:
            yield Native(architecture, settings, folds, (*rules, own), beside, architecture.copies(folded.config))


def _ours(rules: Sequence[Rule]) -> set[str]:
    return {name for rule in rules for name in rule.ours}


def _variants(shape: Shape) -> Iterator[tuple[tuple[Fold, ...], Shape, list[list[Rule]]]]:
    """The model as it is, then with one fold, with two, ..."""
    useful: list[Fold] = []
    last = shape
    for fold in FOLDS:
        if applied := fold.apply(last):
            useful.append(fold)
            last = applied[0]
    for count in range(len(useful) + 1):
        for folds in combinations(useful, count):
            folded, rules = shape, []
            for fold in folds:
                applied = fold.apply(folded)
                if applied is None:
                    break
                folded = applied[0]
                rules.append(applied[1])
            else:
                yield folds, folded, rules
