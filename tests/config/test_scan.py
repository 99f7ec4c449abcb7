"""Lines of keys, against tomllib's own reading of the same text and lines counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path as FilePath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_lite.config.paths import Path
from titan_lite.config.presets import FOLDER
from titan_lite.config.scan import key_lines
from titan_lite.config.toml import toml_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TRICKY = (FilePath(__file__).parent / "data" / "tricky.toml").read_text()


def places(value: Any, path: Path = ()) -> set[Path]:
    """Every place in tomllib's result."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path} - {()} | {place for key, item in items for place in places(item, (*path, key))}


FILES = {"tricky": TRICKY, "windows": TRICKY.replace("\n", "\r\n"), "empty": "", "no line end": "a = 1 # b"} | {
    file.stem: file.read_text() for file in FOLDER.glob("*.toml")
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_the_keys_are_those_of_tomllib(text: str) -> None:
    assert set(key_lines(text)) == places(tomllib.loads(text))


keys = st.text("ab.\" '#=[]é\n\\", max_size=4)
trees = st.dictionaries(
    keys,
    st.recursive(
        st.one_of(st.integers(), st.booleans(), st.text("ab\"'\\\n\r\t\x7f\u2028#[]{}=,", max_size=6)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees)
def test_the_keys_of_any_document(tables: dict[str, Any]) -> None:
    text = toml_text(tables)
    assert tomllib.loads(text) == tables
    assert set(key_lines(text)) == places(tables)


def test_lines_counted_by_hand() -> None:
    lines = key_lines(TRICKY)
    numbered = TRICKY.split("\n")

    def line_of(start: str, nth: int = 0) -> int:
        return [n for n, text in enumerate(numbered, 1) if text.strip().startswith(start)][nth]

    assert lines[("top",)] == 2
    assert lines[("quoted key",)] == 3
    assert lines[("a", "b", "c.d", "e")] == line_of("a.b")
    assert lines[("a", "b", "c.d", "e", 2, "q", "r", 0, "s")] == line_of("{p = 1")
    assert lines[("é\t",)] == line_of('"\\u00e9')
    assert lines[("table", "sub.table", "k")] == line_of("k = ")
    assert lines[("array", 0, "inside", "y")] == line_of("y = 2")
    assert lines[("array", 1)] == line_of("[[array]]", 1)
    assert lines[("array", 1, "deep", 1, "z", "a", "c")] == line_of("z = {")
    assert lines[("table", "after")] == line_of("[table.after]")
