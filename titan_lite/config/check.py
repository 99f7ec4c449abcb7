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
    for path, table in tables_of(job):
        for problem in table.problems(job, world_size):
            yield replace(problem, key=_full(path, problem.key))


def notices(job: Job, world_size: int | None) -> Iterator[str]:
    """The warning lines of all tables, with full keys."""
    for path, table in tables_of(job):
        for line in table.notices(job, world_size):
            yield _full(path, line)


def _full(path: Path, key: str) -> str:
    """A key that begins with "." is relative to the table at `path`."""
    return (key_text(path) + key).lstrip(".") if key.startswith(".") else key
