"""From a TOML file and command-line overrides to a checked Job, or to every problem at once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final

from pydantic import ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from titan_lite.config.aliases import modernise
from titan_lite.config.assets import expand_assets, missing_assets
from titan_lite.config.check import cross_problems, notices
from titan_lite.config.datasets import expand_dataset
from titan_lite.config.errors import (
    COMMAND_LINE,
    FILE_MISSING,
    NOT_HERE,
    TOML_SYNTAX,
    UNKNOWN_KEY,
    ConfigError,
    Problem,
    at_place,
)
from titan_lite.config.merge import Layer, merged
from titan_lite.config.overrides import command_line_layer
from titan_lite.config.paths import Path, get, nearest_origin, parse_key
from titan_lite.config.presets import preset
from titan_lite.config.reader import read_chain
from titan_lite.config.toml import toml_text
from titan_lite.config.translate import problems_of
from titan_lite.job import Job

_OF_THIS_MACHINE: Final = (FILE_MISSING, NOT_HERE)
"""Codes of problems that another machine may not have."""
_LAYERS: Final = ("model", "layers")
_ATTEMPTS: Final = 5
"""Validations of one config: checks between keys run only once the keys themselves are right, or gone."""


def load_job(
    path: str | FilePath, overrides: Sequence[str] = (), world_size: int | None = None, *, files: bool = True
) -> Job:
    """The Job of a TOML file with overrides such as `--training.steps=10`. ConfigError with every problem otherwise.

    `world_size` adds the checks that need it. `files=False` leaves out what this machine lacks (files, devices,
    packages): to estimate or to read a checkpoint, not to train.
    """
    return _Loading(world_size, files).job(read_chain(path), overrides)


def job_from_dict(tables: Mapping[str, Any], world_size: int | None = None, *, files: bool = True) -> Job:
    """The Job of tables made in Python (without `base`)."""
    return _Loading(world_size, files).job([Layer(copy.deepcopy(dict(tables)))], ())


def job_from_toml(text: str, place: FilePath) -> Job:
    """The Job of a resolved config as a checkpoint at `place` keeps it; files it names need not exist any more."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError.at(str(place), f"its config is not valid TOML: {error}", code=TOML_SYNTAX) from None
    return job_from_dict(tables, files=False)


@dataclass
class _Loading:
    """One load: collects problems and warnings over its stages."""

    world_size: int | None
    files: bool
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    """Places whose value is wrong, so that what is said about them later is not to be believed."""

    def job(self, layers: list[Layer], overrides: Sequence[str]) -> Job:
        top = self._layer(layers, overrides)
        job = self._validate(top.tables)
        if job is not None:
            self.problems += [p for p in cross_problems(job, self.world_size) if self._believable(p)]
            self.warnings += notices(job, self.world_size)
        wanted = [p for p in self.problems if self.files or p.code not in _OF_THIS_MACHINE]
        if job is None or wanted:
            error = ConfigError(sorted((_placed(p, top) for p in wanted), key=_order))
            error.warnings = tuple(dict.fromkeys(self.warnings))
            raise error
        job.remember(top.origins, dict.fromkeys(self.warnings))
        return job

    def _layer(self, layers: list[Layer], overrides: Sequence[str]) -> Layer:
        """All layers as one: preset, bases, file, command line, with shorthands written out."""
        for layer in layers:
            self._collect(modernise(layer))
        below = merged(layers, Job).tables
        command_line, problems = command_line_layer(overrides, Job, below)
        self.problems += problems
        self._collect(modernise(command_line))
        layers = [*layers, command_line]
        layers = [*self._preset(merged(layers, Job).tables), *layers]
        top = Layer()
        for layer in layers:
            for expand, place in ((expand_dataset, ("data", "source")), (expand_assets, ("tokenizer",))):
                found = expand(layer, top)
                self._collect(found)
                self.broken += [place] * bool(found[0])
            top = merged([top, layer], Job)
        missing = missing_assets(top)
        if missing is not None:
            self.problems.append(missing)
            self.broken.append(("tokenizer",))
        return top

    def _collect(self, found: tuple[list[Problem], list[str]]) -> None:
        self.problems += found[0]
        self.warnings += found[1]

    def _preset(self, tables: Mapping[str, Any]) -> list[Layer]:
        model = tables.get("model", {})
        name, flavor = (model.get(key, "") if isinstance(model, Mapping) else "" for key in ("name", "flavor"))
        if not name or not isinstance(name, str) or not isinstance(flavor, str):
            return []
        try:
            return [preset(name, flavor, Job)]
        except ConfigError as error:
            self.problems += error.problems
            self.broken.append(("model",))
            return []

    def _validate(self, tables: dict[str, Any]) -> Job | None:
        """The Job. Where keys are wrong, one without them, so that all other checks can run all the same."""
        attempt = tables
        for _ in range(_ATTEMPTS):
            try:
                return Job.model_validate(attempt)
            except ValidationError as error:
                found = problems_of(error, Job, tables)
            fresh = [(place, problem) for place, problem in found if place not in self.broken]
            if attempt is not tables:
                fresh = [(place, problem) for place, problem in fresh if self._believable(problem)]
            self.problems += [problem for _, problem in fresh]
            self.broken += [place for place, _ in fresh]
            removed = self.broken if attempt is tables else [place for place, _ in found]
            attempt = copy.deepcopy(attempt)
            for place in removed:
                _remove(attempt, place)
        return None

    def _believable(self, problem: Problem) -> bool:
        """False for a problem that may come only from the default that stands in for a broken value."""
        values = [p for p in self.broken if p not in {parse_key(q.key) for q in self.problems if q.code == UNKNOWN_KEY}]
        text = f"{problem.why} {problem.allowed}"
        for place in values:
            if parse_key(problem.key)[: len(place)] == place:
                return False
            if len(place) > 1 and isinstance(place[-1], str) and place[-1] in text:
                return False
        return True


def _remove(tables: dict[str, Any], place: Path) -> None:
    """Drops what stands at `place`: a whole list for one of its items, a whole table for a key missing in it."""
    while place:
        *around, last = place
        try:
            table = get(tables, tuple(around))
        except KeyError:
            return
        if tuple(around) == _LAYERS and isinstance(table, list) and isinstance(last, int):
            table[last] = {"at": 0}  # says nothing, and the others keep their places
            return
        if place[:-2] == _LAYERS and last == "at":
            place = tuple(around)
            continue
        if isinstance(table, dict) and last in table:
            del table[last]
            return
        place = tuple(around)


def _placed(problem: Problem, top: Layer) -> Problem:
    """The problem with file and line, as far as its key, or a table around it, was set anywhere."""
    origin = nearest_origin(top.origins, parse_key(problem.key))
    return problem if origin is None else at_place(problem, *origin)


def _order(problem: Problem) -> tuple[bool, str, int]:
    return problem.file == COMMAND_LINE, problem.file, problem.line


def to_toml(job: Job) -> str:
    """The resolved config as TOML: every setting, so that it loads as an equal Job whatever the defaults become."""
    return toml_text(job.model_dump())
