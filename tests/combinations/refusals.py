"""What a refused job says about levels: the set of them that the rule speaks of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.combinations.covering import Nogood
from tests.combinations.factors import ABSENT, Factor, Row, tables_of
from titan_lite.config.errors import CROSS_FIELD, NOT_HERE, ConfigError, Problem
from titan_lite.config.load import job_from_dict
from titan_lite.job import Job

_FULL_KEY = re.compile(rf"\b(?:{'|'.join(Job.model_fields)})(?:\.\w+(?:\[\d+\])?)+")
_NEAR_KEY = re.compile(r"\b([a-z_]+(?:\.[a-z_]+)*) = ")
_KEY_OF_THE_JOB = re.compile(rf"\b({'|'.join(name for name in Job.model_fields if name != 'model')})\.\w+")


class AccidentError(AssertionError):
    """A refusal that is none of a rule: it does not name the settings that do not fit together."""


def job_of(row: Row, factors: Mapping[str, Factor], folder: Path) -> Job:
    """The job of a row; ConfigError where it is refused."""
    return job_from_dict(tables_of(row, factors, folder))


def refused(row: Row, factors: Mapping[str, Factor], folder: Path) -> list[Nogood]:
    """`nogoods` of a row's job."""
    return nogoods(tables_of(row, factors, folder), row)


def nogoods(tables: dict[str, Any], row: Row, world_size: int | None = None) -> list[Nogood]:
    """The levels that each problem of a row's job names. AccidentError for one of another kind, or with one name."""
    try:
        job_from_dict(tables, world_size)
    except ConfigError as error:
        found = [_named(problem, row) for problem in error.problems]
        sets = [frozenset((key, row[key]) for key in keys) for keys in found if keys]
        if not sets:
            raise AccidentError(f"refused for what is no level of a factor:\n{error}") from None
        return sets
    return []


def _named(problem: Problem, row: Row) -> set[str]:
    """The factors that the problem names; none for a lack of this machine that goes with another one."""
    there = {key for key, level in row.items() if level != ABSENT}
    first = _factors_of(problem.key, there)
    if problem.code == NOT_HERE:
        return first if first & {problem.key, problem.key.removesuffix(".type")} else set()
    if problem.code != CROSS_FIELD:
        raise AccidentError(f"not a rule about combinations:\n{problem}")
    others = set().union(*(_factors_of(key, there) for key in _FULL_KEY.findall(problem.why)))
    others |= {key for name in _NEAR_KEY.findall(problem.why) for key in _near(problem.key, name, there)}
    if not first or not (others - first or _KEY_OF_THE_JOB.search(problem.why)):
        raise AccidentError(f"the refusal does not name two keys:\n{problem}")
    return first | others


def _factors_of(key: str, there: set[str]) -> set[str]:
    """The innermost factor that a key belongs to; for a key of a single layer, also that of the key it overrides."""
    if of_a_layer := re.match(r"model\.layers\[\d+\]\.(.+)", key):
        return {"model.layers"} | _factors_of(f"model.{of_a_layer[1]}", there)
    parts = re.sub(r"\[\d+\].*", "", key).split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return set(next(([name] for name in names if name in there), []))


def _near(key: str, name: str, there: set[str]) -> set[str]:
    """The factor that `name` means in a table around `key`."""
    around = key.split(".")
    for length in range(len(around) - 1, 0, -1):
        full = ".".join((*around[:length], name))
        if found := {full, full.removesuffix(".type")} & there:
            return found
    return set()
