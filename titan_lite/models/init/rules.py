"""What is wrong with the rules of [model.init], given the parameters of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.models.init.base import Distribution, InitRule
from titan_lite.models.init.normal import Zeros
from titan_lite.models.layers import variants
from titan_lite.models.residual import ReZero
from titan_lite.models.spec import Spec, specs_of

if TYPE_CHECKING:
    from titan_lite.job import Job

KEY = "model.init"


def init_problems(job: Job) -> Iterator[Problem]:
    """Rules that decide nothing, and zeros that no gradient would ever leave. Builds the model where need be."""
    config = job.model.init
    assert isinstance(config, Distribution.Config)
    if not config.rules and not isinstance(config, Zeros.Config):
        return
    specs = specs_of(job.model)
    if specs is None:
        return
    yield from idle_rules(config.rules, specs)
    yield from _dead_zeros(job, config, specs)


def idle_rules(rules: Sequence[InitRule], specs: Mapping[str, Spec]) -> Iterator[Problem]:
    """Rules without a parameter to decide about."""
    decided: set[str] = set()
    for i, rule in enumerate(rules):
        matched = [name for name, spec in specs.items() if rule.matches(name, spec)]
        drawn = {name for name in matched if isinstance(specs[name].start, str)}
        if drawn <= decided:
            why = "matches only parameters that earlier rules decide about"
            if not drawn:
                why = "matches only parameters that start as a constant, or on their own: gains, biases, registers"
            if not matched:
                why = "matches no parameter of the model"
            given = rule.model_dump(include={"match", "role"}, exclude_none=True)
            yield Problem(CROSS_FIELD, f"{KEY}.rules[{i}]", why, given, f"what is drawn: {_overview(specs)}")
        decided |= drawn


def _overview(specs: Mapping[str, Spec]) -> str:
    """The names of the parameters that are drawn, with * for the numbers of layers."""
    drawn = (name for name, spec in specs.items() if isinstance(spec.start, str))
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in drawn))


def _dead_zeros(job: Job, config: Distribution.Config, specs: Mapping[str, Spec]) -> Iterator[Problem]:
    """Zeros that no gradient ever leaves."""
    zeros = {name: key for name, spec in specs.items() if (key := _key_of_zeros(config, name, spec))}
    if zeros.keys() >= {name for name, spec in specs.items() if isinstance(spec.start, str)}:
        why = "leaves every matrix of the model at 0, where all gradients are 0"
        yield Problem(CROSS_FIELD, KEY, why, allowed='type = "zeros" for some matrices only')
    said = set()
    for variant in variants(job.model):
        scale = variant.layer.residual.scale
        if not (isinstance(scale, ReZero.Config) and scale.init == 0):
            continue
        last = job.model.n_layers - 1
        blocks = (*(f"stack.blocks.{number}." for number in variant.numbers), *(["mtp."] * (last in variant.numbers)))
        other = f"{variant.key('residual')}.scale.type"
        why = f'does not go with {other} = "rezero" with init 0: each stops the other\'s gradient'
        allowed = "another init for the matrices that write into the residual stream, or a scale.init other than 0"
        for name, key in zeros.items():
            if name.startswith(blocks) and specs[name].start == "residual" and (key, other) not in said:
                said.add((key, other))
                yield Problem(CROSS_FIELD, key, why, "zeros", allowed)


def _key_of_zeros(config: Distribution.Config, name: str, spec: Spec) -> str:
    """The key that makes this parameter start at 0; "" where none does."""
    if not isinstance(spec.start, str):
        return ""
    for i, rule in enumerate(config.rules):
        if rule.matches(name, spec):
            return f"{KEY}.rules[{i}].init.type" if isinstance(rule.init, Zeros.Config) else ""
    return f"{KEY}.type" if isinstance(config, Zeros.Config) else ""
