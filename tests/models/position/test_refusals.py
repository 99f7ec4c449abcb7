"""Position settings that make no sense are refused when the config is read, with their full keys."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs import tiny_job
from titan_lite.config.errors import ConfigError

AT = "model.attention.position"
YARN = {"type": "yarn", "factor": 2.0, "original_max_len": 16}
LLAMA3 = {"type": "llama3", "factor": 2.0, "original_max_len": 16}


def refusals(position: dict[str, Any], head_dim: int = 16, seq_len: int = 16) -> dict[str, str]:
    """{key: the problem as users see it}."""
    attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": head_dim, "position": {"type": "rope"} | position}
    try:
        tiny_job(model={"dim": 32, "n_layers": 1, "attention": attention}, training={"seq_len": seq_len})
    except ConfigError as error:
        return {problem.key: str(problem) for problem in error.problems}
    return {}


@pytest.mark.parametrize(
    ("fraction", "head_dim", "key", "allowed"),
    [
        (1.0, 15, "model.attention.head_dim", "an even number"),
        (0.5, 1, "model.attention.head_dim", "an even number"),
        (0.5, 10, f"{AT}.fraction", "0.4"),
        (0.1, 16, f"{AT}.fraction", "0.125"),
        (0.05, 16, f"{AT}.fraction", "0.125"),
        (0.3, 10, f"{AT}.fraction", "0.4"),
    ],
)
def test_a_head_without_whole_pairs(fraction: float, head_dim: int, key: str, allowed: str):
    found = refusals({"fraction": fraction}, head_dim)
    assert found.keys() == {key}
    assert found[key].endswith(allowed)
    if key.endswith("fraction"):
        assert f"head_dim = {head_dim}" in found[key]
        assert refusals({"fraction": float(allowed)}, head_dim) == {}


def test_fractions_of_decimal_digits():
    assert 0.58 * 100 < 58
    assert refusals({"fraction": 0.58}, head_dim=100) == {}


@pytest.mark.parametrize("value", [0.0, 1.1, -0.5, float("nan")])
def test_fractions_are_parts(value: float):
    assert refusals({"fraction": value}).keys() == {f"{AT}.fraction"}


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.5}, "factor"),
        ({"type": "ntk", "factor": float("inf")}, "factor"),
        ({"type": "dynamic_ntk"}, "original_max_len"),
        ({"type": "yarn", "factor": 4.0}, "original_max_len"),
        ({"type": "llama3", "original_max_len": 8}, "factor"),
        ({"type": "llama3", "factor": 0.9, "original_max_len": 8}, "factor"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor"),
        (YARN | {"beta_slow": 32.0}, "beta_slow"),
        (YARN | {"mscale": 1.0}, "mscale"),
        (YARN | {"mscale_all_dim": 1.0}, "mscale_all_dim"),
        (YARN | {"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}, "attention_factor"),
        ({"type": "lswt", "a": 0.1}, "a"),
        ({"type": "lswt", "b": 2.0}, "b"),
        ({"type": "none", "factor": 2.0}, "factor"),
    ],
    ids=str,
)
def test_scaling_keys(scaling: dict[str, Any], key: str):
    assert refusals({"scaling": scaling}).keys() == {f"{AT}.scaling.{key}"}


def test_no_such_scaling():
    found = refusals({"scaling": "longrope"})
    assert found.keys() == {f"{AT}.scaling.type"}
    assert "dynamic_ntk, linear, llama3, lswt, none, ntk, yarn" in found[f"{AT}.scaling.type"]


@pytest.mark.parametrize("scaling", [YARN, LLAMA3], ids=str)
def test_texts_longer_than_the_scaling_reaches(scaling: dict[str, Any]):
    assert refusals({"scaling": scaling}, seq_len=32) == {}
    found = refusals({"scaling": scaling}, seq_len=33)
    assert found.keys() == {f"{AT}.scaling.factor"}
    text = found[f"{AT}.scaling.factor"]
    assert all(part in text for part in ("training.seq_len is 33", "reaches 32", "at least 3,"))


@pytest.mark.parametrize("kind", ["ntk", "dynamic_ntk", "lswt"])
def test_a_single_pair_has_no_other_base(kind: str):
    keys: dict[str, dict[str, Any]] = {"ntk": {"factor": 2.0}, "dynamic_ntk": {"original_max_len": 8}, "lswt": {}}
    scaling = {"type": kind} | keys[kind]
    assert refusals({"scaling": scaling, "fraction": 0.25}) == {}
    found = refusals({"scaling": scaling, "fraction": 0.125})
    assert found.keys() == {f"{AT}.scaling.type"}
    assert "fraction" in found[f"{AT}.scaling.type"]


def test_yarn_wants_falling_frequencies():
    assert refusals({"scaling": YARN, "theta": 1.0}).keys() == {f"{AT}.scaling.type"}


@pytest.mark.parametrize(
    "position",
    [
        {"direction": "reversed", "scaling": YARN, "layout": "interleaved", "frequencies": "learned", "fraction": 0.5},
        {"direction": "reversed", "scaling": {"type": "dynamic_ntk", "original_max_len": 8}},
        {"scaling": {"type": "lswt", "train_len": 8, "a": 0.1, "b": 1.5}},
        {"scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    ],
    ids=str,
)
def test_what_combines_is_accepted(position: dict[str, Any]):
    assert refusals(position) == {}
