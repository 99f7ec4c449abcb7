"""What checkpoints need to know of the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, Protocol

import torch.distributed as dist

from titan_lite.config.errors import MISSING, ConfigError, Problem, show


class World(Protocol):
    """The ranks of a run; `parallel/world.py` has the real one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def save_group(self) -> dist.ProcessGroup | None:
        """A gloo group of all ranks that only saves use (None: one rank)."""

    def gather(self, obj: Any, /) -> list[Any]:
        """`obj` of every rank, on every rank."""

    def broadcast(self, obj: Any, /) -> Any:
        """`obj` of rank 0, on every rank."""


class Alone:
    """The world of a script: one rank."""

    rank = 0
    size = 1
    save_group = None

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        return obj


@contextmanager
def agreed(world: World) -> Iterator[None]:
    """A ConfigError of any rank inside is raised on every rank, with the problems of all. Collective.

    Problems travel as plain tuples: nothing is unpickled into a class.
    """
    problems: list[Problem] = []
    try:
        yield
    except ConfigError as error:
        problems = error.problems
    rows = [[p.code, p.key, p.why, _plain(p.value), *astuple(p)[4:]] for p in problems]
    merged: dict[Problem, None] = {}
    for code, key, why, value, *rest in (row for rank in world.gather(rows) for row in rank):
        merged[Problem(code, key, why, MISSING if value is None else value, *rest)] = None
    if merged:
        raise ConfigError(merged)


def _plain(value: Any) -> bool | float | str | None:
    if value is MISSING:
        return None
    return value if isinstance(value, bool | int | float | str) else show(value)
