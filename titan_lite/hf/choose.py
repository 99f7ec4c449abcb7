"""Which Hugging Face architecture a model is, and how its tensors become that one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from titan_lite.config.errors import ConfigError, Problem
from titan_lite.hf import ARCHITECTURES, Architecture
from titan_lite.hf.folds import FOLDS, Fold, Shape
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rule import Rule
from titan_lite.hf.source import Image, Source


@dataclass(frozen=True)
class Native:
    """A published architecture that computes what the model computes, once `folds` are in its weights."""

    architecture: Architecture
    settings: Tables
    folds: tuple[Fold, ...]
    rules: tuple[list[Rule], ...]
    """One list for each fold, and the architecture's, which has no rule for buffers that only training reads."""

    @property
    def exact(self) -> bool:
        """Whether no weight was computed for a fold."""
        return all(fold.lossless for fold in self.folds)

    def tensors(self, ours: Source) -> Source:
        """Their tensors under their published names. KeyError where one of ours is missing."""
        source = ours
        for rules in self.rules:
            source = Image(rules, source)
        return self.architecture.files.published(source)


def native(shape: Shape) -> Native | None:
    """The architecture that needs the fewest folds, of those the first in the registry; None where there is none."""
    for folds, folded, rules in _variants(shape):
        for architecture in ARCHITECTURES.values():
            try:
                settings = architecture.settings(folded.config, shape.vocab_size, shape.context_len)
            except ConfigError:
                continue
            if _ours(own := architecture.rules(folded.config)) >= folded.parameters:
                return Native(architecture, settings, folds, (*rules, own))
    return None


def refusals(shape: Shape, model_type: str) -> list[Problem]:
    """Why an architecture cannot be this model, without folds."""
    try:
        ARCHITECTURES[model_type].settings(shape.config, shape.vocab_size, shape.context_len)
    except ConfigError as error:
        return error.problems
    return []


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
