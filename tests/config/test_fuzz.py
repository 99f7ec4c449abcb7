"""Whatever a config says, the answer is a Job or a ConfigError, never another exception."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job, to_toml
from titan_lite.config.paths import key_text, put
from titan_lite.config.schema import all_keys
from titan_lite.job import Job
from titan_lite.models.layers import SLOTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BYTES = (Path(__file__).parent / "data" / "llama3_8b.toml").read_bytes()
KEYS = sorted(set(all_keys(Job)))
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

scalars = st.one_of(
    st.integers(),
    st.integers(-2, 9),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.dates(),
    st.sampled_from(["", "llama3", "8B", "c4", "hf:", "op", "gqa", "document", "\x1b", "\udc80"]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "path", "x", "a.b", ""]), inner)
    ),
    max_leaves=6,
)


layers = st.lists(
    st.dictionaries(st.sampled_from([*SLOTS, "at", "at", "x"]), values | st.sampled_from(["0", "::2", "1,-1", "-9"]))
    | st.builds(
        lambda at, slot, key, value: {"at": at, slot: {key: value}},
        st.sampled_from([0, -1, "::2", ":", "0,1", "7"]),
        st.sampled_from(SLOTS),
        st.sampled_from(sorted({key[2] for key in KEYS if len(key) > 2 and key[1] in SLOTS})),
        values,
    ),
    max_size=4,
)


def refused_or_loaded(load: Callable[[], Job]) -> None:
    try:
        job = load()
    except ConfigError as error:
        found, text = error.problems, str(error)
    else:
        assert job_from_dict(tomllib.loads(to_toml(job))) == job
        return
    assert found
    assert all(problem.code and problem.why for problem in found)
    assert all(line.isprintable() for line in text.split("\n"))


@QUICK
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=6), st.sampled_from([None, 1, 3, 8]))
def test_any_value_at_any_key(settings_: list[tuple[Any, Any]], world_size: int | None) -> None:
    tables: dict[str, Any] = {}
    for path, value in settings_:
        with contextlib.suppress(KeyError):
            put(tables, path, value)
    refused_or_loaded(lambda: job_from_dict(tables, world_size))


@QUICK
@given(layers, st.sampled_from([{}, {"n_layers": 2}, {"ffn": "mlp", "attention": {"position": "none"}, "norm": 3}]))
def test_any_layers(entries: list[Any], model: dict[str, Any]) -> None:
    refused_or_loaded(lambda: job_from_dict({"model": {**model, "layers": entries}}))


@QUICK
@given(
    st.integers(0, len(BYTES)), st.integers(0, 40), st.binary(max_size=12) | st.text("[]{}=\"'#.,\n\\a1", max_size=12)
)
def test_damaged_file(tmp_path: Path, start: int, length: int, patch: bytes | str) -> None:
    file = tmp_path / "damaged.toml"
    file.write_bytes(BYTES[:start] + (patch.encode() if isinstance(patch, str) else patch) + BYTES[start + length :])
    refused_or_loaded(lambda: load_job(file))


@QUICK
@given(
    st.lists(
        st.one_of(
            st.text(max_size=10),
            st.sampled_from(["--training.steps", "--checkpoint.enable", "--checkpoint.no_enable", "true", "-1", "--"]),
            st.builds(lambda key, raw: f"--{key_text(key)}={raw}", st.sampled_from(KEYS), st.text(max_size=10)),
        ),
        max_size=5,
    )
)
def test_any_override(tmp_path: Path, overrides: list[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text("")
    refused_or_loaded(lambda: load_job(file, overrides))
