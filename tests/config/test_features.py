"""The table of features: what each component must say about itself, and how the table gets into the README."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from titan_lite.config.component import Component, ConfigBase, SlotConfig
from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, NOT_HERE, ConfigError
from titan_lite.config.features import (
    BEGIN,
    END,
    NOTHING,
    choices,
    documented,
    example,
    feature_table,
    places,
    rows,
    write_features,
)
from titan_lite.config.load import load_job
from titan_lite.config.paths import Path, get, key_text
from titan_lite.config.toml import value_text
from titan_lite.models.transformer import Transformer

CHOICES = [
    (place, name, choice) for place in places(Transformer.Config, ("model",)) for name, choice in choices(place.family)
]
NAMES = [f"{key_text(place.path)}={name}" for place, name, _ in CHOICES]


@pytest.mark.parametrize(("place", "name", "choice"), CHOICES, ids=NAMES)
def test_every_choice_has_a_docstring_with_a_source_and_an_example_that_is_read(place, name, choice, write) -> None:
    what, source = documented(choice)
    assert what, f"{choice.component.__name__} has no docstring with a sentence"
    assert source or name == NOTHING, f'{choice.component.__name__}: its docstring has no "Source: ..."'
    path, value = example(place, choice)
    found, codes = types_at(place.path, write(f"{key_text(path)} = {value_text(value)}"))
    assert name in found or (codes and codes <= {CROSS_FIELD, FILE_MISSING, NOT_HERE})


def types_at(path: Path, file: FilePath) -> tuple[list[str], set[str]]:
    """The types that a file chooses; the codes of its problems, where it goes with other choices or other machines."""
    try:
        job = load_job(file)
    except ConfigError as error:
        return [], {problem.code for problem in error.problems}
    found = get(job.model_dump(), path)
    return [one["type"] for one in (found if isinstance(found, (list, tuple)) else [found])], set()


class Outer(Component):
    class Config(SlotConfig):
        slot: ClassVar[str] = "test_outer"
        default_type: ClassVar[str | None] = "none"


class NoOuter(Outer):
    """Nothing at all."""

    class Config(Outer.Config):
        type: Literal["none"] = "none"


class Inner(Component):
    class Config(SlotConfig):
        slot: ClassVar[str] = "test_inner"


class OneInner(Inner):
    """y = |x|. More words.

    Source: arXiv 1234.56789, section 2;
    elsewhere.

    And more.
    """

    class Config(Inner.Config):
        type: Literal["one"] = "one"
        size: int = Field(examples=[3, 4])
        """Size."""
        mode: Literal["a", "b"]
        """Mode."""


class SomeOuter(Outer):
    """Something. Source:
    arXiv 2345.67891."""

    class Config(Outer.Config):
        type: Literal["some"] = "some"
        inner: Inner.Config = Field(examples=["one"])
        """Slot in a slot."""
        width: int = Field(examples=[7])
        """Width."""


class Table(ConfigBase):
    outer: Outer.Config = NoOuter.Config()
    outers: tuple[Outer.Config, ...] = (NoOuter.Config(),)
    again: Outer.Config = NoOuter.Config()


ROWS = [
    (
        "test_outer some",
        'x.outer = { type = "some", inner = "one", width = 7 }',
        "Something.",
        "arXiv 2345.67891",
    ),
    (
        "test_inner one",
        'x.outer = { type = "some", inner = { type = "one", size = 3, mode = "a" }, width = 7 }',
        "y = |x|.",
        "arXiv 1234.56789, section 2; elsewhere",
    ),
]


def test_rows_of_slots_in_slots() -> None:
    """The part that is absent has no row, and a slot that stands in many places has one each."""
    assert list(rows(Table, ("x",))) == ROWS
    text = feature_table(Table, ("x",))
    assert "| y = \\|x\\|. | [arXiv 1234.56789](https://arxiv.org/abs/1234.56789), section 2; elsewhere |" in text


def test_a_key_that_must_be_set_needs_an_example() -> None:
    class Bare(Outer):
        """y."""

        class Config(Outer.Config):
            type: Literal["bare"] = "bare"
            size: int
            """Size."""

    try:
        with pytest.raises(LookupError, match=r"Bare\.Config\.size must be set and has no example"):
            feature_table(Table, ("x",))
    finally:
        del Outer.Config.choices["bare"]


def test_the_table_is_written_between_its_marks(tmp_path: FilePath) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"# a\n{BEGIN}\nold\n{END}\n# b\n")
    write_features(file, "new")
    write_features(file, "newer")
    assert file.read_text() == f"# a\n{BEGIN}\nnewer\n{END}\n# b\n"
    file.write_text("# a")
    with pytest.raises(ConfigError, match="has no place for the table"):
        write_features(file, "new")
