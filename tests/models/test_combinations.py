"""The matrix of combinations: each row is refused (or warned of) by name, and only where both settings meet."""

from __future__ import annotations

from typing import Any

import pytest

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, ConfigError, Problem
from titan_lite.config.features import example_table
from titan_lite.config.load import job_from_dict
from titan_lite.config.paths import get, put
from titan_lite.config.schema import field_at, is_list, is_slot, table_of
from titan_lite.job import Job
from titan_lite.models.combinations import RULES, Rule


def job(key: str, value: Any, other: str, other_value: Any) -> dict[str, Any]:
    """Tables of a job with these two settings and what else their types must be given."""
    tables: dict[str, Any] = {}
    for name, setting in sorted(((key, value), (other, other_value)), key=lambda pair: pair[0].count(".")):
        path = tuple(name.split("."))
        if is_list(field_at(Job, path, tables).annotation):
            setting = [setting]
        if path[-1] == "type":
            family = table_of(field_at(Job, path[:-1], tables).annotation)
            assert is_slot(family)
            assert issubclass(family, SlotConfig)
            for part, given in example_table(family.choices[setting]).items():
                put(tables, (*path[:-1], part), given)
        put(tables, path, setting)
    return tables


def found(tables: dict[str, Any]) -> list[Problem]:
    try:
        job_from_dict(tables)
    except ConfigError as error:
        return error.problems
    return []


def values_of(rule: Rule, broken: bool) -> list[Any]:
    """Values of the second key that break the rule, or keep it."""
    if broken == (rule.verb != "needs"):
        return list(rule.others)
    if rule.other.endswith(".type"):
        family = table_of(field_at(Job, tuple(rule.other.split("."))[:-1], {}).annotation)
        assert family is not None
        assert issubclass(family, SlotConfig)
        return sorted(set(family.choices) - set(rule.others))
    return [0.1 if isinstance(rule.others[0], float) else 3] * broken  # it needs a zero


def names(rule: Rule) -> str:
    return f"{rule.key}={rule.values[0]} {rule.verb} {rule.other}"


def speaks(problem: Problem, rule: Rule) -> bool:
    return (
        problem.code == CROSS_FIELD
        and problem.key == rule.key
        and rule.other in problem.why
        and rule.why in problem.why
    )


REFUSALS = [rule for rule in RULES if rule.verb != "warns of"]


@pytest.mark.parametrize("rule", REFUSALS, ids=map(names, REFUSALS))
def test_each_row_is_refused_by_both_names(rule: Rule) -> None:
    spoke, turned = 0, (rule.other, rule.key)
    for value in rule.values:
        for other in values_of(rule, broken=True):
            said = found(job(rule.key, value, rule.other, other))
            if any(problem.code != CROSS_FIELD for problem in said):
                continue  # a value of another key of the same row
            if any(speaks(problem, row) for problem in said for row in RULES if (row.key, row.other) == turned):
                continue  # another row says it, from the other side
            (problem,) = [problem for problem in said if speaks(problem, rule)]
            assert problem.value == value
            assert problem.allowed
            spoke += 1
        for other in values_of(rule, broken=False):
            assert not any(speaks(problem, rule) for problem in found(job(rule.key, value, rule.other, other)))
    assert spoke


WARNINGS = [rule for rule in RULES if rule.verb == "warns of"]


@pytest.mark.parametrize("rule", WARNINGS, ids=map(names, WARNINGS))
def test_each_warning_says_both_names(rule: Rule) -> None:
    for value in rule.values:
        for other in rule.others:
            tables = job(rule.key, value, rule.other, other)
            (line,) = [line for line in job_from_dict(tables).warnings if rule.why in line]
            assert f'{rule.key} = "{value}" with {rule.other} = "{other}"' in line
        for other in values_of(rule, broken=False):
            assert not any(rule.why in line for line in job_from_dict(job(rule.key, value, rule.other, other)).warnings)


def test_what_is_allowed_instead_is_said() -> None:
    (problem,) = found({"model": {"block": "parallel", "residual": "post"}})
    needed = 'model.residual.type = "pre" or "peri" or "out_only" or "none"'
    reason = "each branch is added to the stream by itself, so nothing may happen to the sum"
    assert str(problem).split("\n") == [
        'E005  model.block.type = "parallel"',
        f'    needs {needed}, not "post": {reason}',
        f"    allowed: {needed}, or another model.block.type",
    ]
    (problem,) = found({"model": {"attention": {"position": {"direction": "reversed"}, "qk_norm": "l2_scaled"}}})
    others = '"none" or "rms" or "rms_full" or "rms_gainless" or "rms_per_head"'
    wanted = f"model.attention.qk_norm.type = {others}, or another model.attention.position.direction"
    assert problem.allowed == wanted


def test_a_layer_is_judged_as_it_turns_out() -> None:
    model: dict[str, Any] = {"n_layers": 4, "block": "parallel", "layers": [{"at": "1::2", "residual": "post"}]}
    (problem,) = found({"model": model})
    assert problem.key == "model.block.type"
    assert 'not "post"' in problem.why
    assert "model.layers[0].residual.type" in problem.why
    model["layers"].append({"at": "1::2", "block": "sequential"})
    assert found({"model": model}) == []
    model["layers"] = [{"at": ":", "block": "sequential"}, {"at": 2, "residual": "post"}]
    assert found({"model": model}) == []
    model["layers"].append({"at": "2,3", "block": {"type": "parallel"}})
    (problem,) = found({"model": model})
    assert problem.key == "model.layers[2].block.type"
    assert get(model, ("layers", 2, "block", "type")) == problem.value


@pytest.mark.parametrize(("whole", "single"), [("pre", "admin"), ("pre", "ngpt")])
def test_residuals_of_the_whole_stream_are_none_of_a_single_layer(whole: str, single: str) -> None:
    said = found({"model": {"residual": whole, "norm": "none", "layers": [{"at": 0, "residual": single}]}})
    why = f'is the choice of some layers only, beside model.residual.type = "{whole}"'
    assert [p.key for p in said if why in p.why] == ["model.layers[0].residual.type"]


def test_layers_with_different_positions_are_warned_of() -> None:
    mixed = {"attention": {"position": "alibi"}, "layers": [{"at": "::2", "attention": {"position": "rope"}}]}
    (line,) = job_from_dict({"model": mixed}).warnings
    assert line.startswith(
        'model.attention.position.type = "alibi" stands beside model.layers[0].attention.position.type'
    )
    plain = {"attention": {"position": "alibi"}, "layers": [{"at": "::2", "attention": {"position": "none"}}]}
    assert job_from_dict({"model": plain}).warnings == ()


@pytest.mark.parametrize("masks", [["causal"], ["causal", "document"]])
def test_what_counts_from_the_row_is_told_where_documents_are_masked(masks: list[str]):
    attention = {"n_heads": 4, "masks": masks, "position": "none"}
    model = {"dim": 16, "attention": attention, "embedding": {"position": "sinusoidal"}}
    told = [line for line in job_from_dict({"model": model}).warnings if "packed document begins" in line]
    assert len(told) == ("document" in masks)
