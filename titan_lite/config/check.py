"""Checks over a whole Job: what each of its tables says about itself, its neighbours and the world size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import Problem
from titan_lite.config.paths import Path, key_text

if TYPE_CHECKING:
    from titan_lite.job import Job


def tables_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, ConfigBase]]:
    """Every table of a Job with its place, outer ones first."""
    if isinstance(value, ConfigBase):
        yield path, value
        for name in type(value).model_fields:
            yield from tables_of(getattr(value, name), (*path, name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tables_of(item, (*path, index))


def cross_problems(job: Job, world_size: int | None) -> Iterator[Problem]:
    """What all tables report, with full keys."""
    yield from problems_below(job, (), job, world_size)


def notices(job: Job, world_size: int | None) -> Iterator[str]:
    """The warning lines of all tables, with full keys."""
    yield from notices_below(job, (), job, world_size)


def problems_below(table: ConfigBase, path: Path, job: Job, world_size: int | None) -> Iterator[Problem]:
    """What a table of the job and those inside it report, with the keys of a table at `path`."""
    for place, below in tables_of(table, path):
        for problem in below.problems(job, world_size):
            yield replace(problem, key=_full(place, problem.key))


def notices_below(table: ConfigBase, path: Path, job: Job, world_size: int | None) -> Iterator[str]:
    """The warning lines of a table of the job and of those inside it, with the keys of a table at `path`."""
    for place, below in tables_of(table, path):
        for line in below.notices(job, world_size):
            yield _full(place, line)


def _full(path: Path, key: str) -> str:
    """A key that begins with "." is relative to the table at `path`."""
    return (key_text(path) + key).lstrip(".") if key.startswith(".") else key
