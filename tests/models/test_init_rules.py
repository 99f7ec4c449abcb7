"""[[model.init.rules]]: which init a parameter gets, and the rules that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.explain import explain, json_schema
from titan_lite.config.load import job_from_dict, job_from_toml, load_job, to_toml
from titan_lite.job import Job
from titan_lite.models.init import initialize
from titan_lite.models.spec import collect_specs

STD_RTOL = 0.05
"""Of a thousand draws, two standard errors."""


def stds(**init: Any) -> dict[str, float]:
    """Standard deviations of the second layer, embedding and head of a tiny model (D 32, F 48, L 2)."""
    weights = dict(tiny_model(init=init).named_parameters())
    return {name.removeprefix("stack.blocks.1."): weight.std().item() for name, weight in weights.items()}


def test_mup():
    """Embedding 1, hidden matrices 1 / sqrt(fan-in), head 1 / D, zero queries. features.md, section 6."""
    found = stds(
        type="fan_in",
        depth_scaled=False,
        rules=[
            {"role": "head", "init": {"type": "fan_in", "power": 1.0}},
            {"match": "*.q.weight", "init": "zeros"},
        ],
    )
    expected = {"embedding.weight": 1.0, "attention.o.weight": 32**-0.5, "ffn.down.weight": 48**-0.5}
    for name, std in (expected | {"ffn.up.weight": 32**-0.5, "head.output.weight": 1 / 32}).items():
        assert found[name] == pytest.approx(std, rel=STD_RTOL), name
    assert found["attention.q.weight"] == 0


def test_the_first_match_wins_and_the_rest_keep_the_main_init():
    found = stds(
        type="normal",
        std=0.01,
        depth_scaled=False,
        rules=[
            {"match": "stack.blocks.[1-9].ffn.?*", "init": {"type": "normal", "std": 0.2, "depth_scaled": False}},
            {"role": "hidden", "init": {"type": "normal", "std": 0.3}},
        ],
    )
    expected = {
        "ffn.down.weight": 0.2,
        "ffn.up.weight": 0.2,
        "attention.q.weight": 0.3,
        "attention.o.weight": 0.3 / 2,  # a rule's init has its own depth scaling: sqrt(2 L) = 2
        "embedding.weight": 0.01,
        "head.output.weight": 0.01,
        "stack.blocks.0.ffn.up.weight": 0.3,
    }
    for name, std in expected.items():
        assert found[name] == pytest.approx(std, rel=STD_RTOL), name


def test_constants_stay_constants():
    """A glob over all names changes no gain and no bias."""
    rules = [{"match": "*", "init": {"type": "normal", "std": 3.0}}]
    model = tiny_model(init={"rules": rules}, ffn={"hidden": 48, "bias": True})
    assert torch.equal(model.norm.weight, torch.ones(32))
    assert not model.stack.blocks["0"].ffn.down.bias.any()


def tables(init: Any, **model: Any) -> dict[str, Any]:
    return {"model": {"dim": 32, "n_layers": 2, "attention": {"n_heads": 4}, "init": init} | model}


def problems(init: Any, **model: Any) -> dict[str, tuple[str, str]]:
    """{key: (why, allowed)} of what the check of a config says."""
    with pytest.raises(ConfigError) as caught:
        job_from_dict(tables(init, **model))
    return {problem.key: (problem.why, problem.allowed) for problem in caught.value.problems}


def test_rules_that_decide_nothing():
    rules = [
        {"match": "*.o.weight", "init": "normal"},
        {"match": "*.foo", "init": "normal"},
        {"role": "router", "init": "normal"},
        {"role": "norm", "init": "zeros"},
        {"match": "stack.*.o.weight", "init": "like"},
    ]
    found = problems({"rules": rules})
    assert list(found) == [f"model.init.rules[{i}]" for i in (1, 2, 3, 4)]
    reasons = [why for why, _ in found.values()]
    assert reasons[0] == reasons[1] == "matches no parameter of the model"
    assert "start as a constant" in reasons[2]
    assert "earlier rules" in reasons[3]
    assert all("stack.blocks.*.ffn.gate.weight" in allowed for _, allowed in found.values())


def test_building_refuses_them_too():
    config = tiny_config(init={"rules": [{"match": "*.foo", "init": "normal"}]})
    model = config.build(vocab_size=VOCAB)
    with pytest.raises(ConfigError) as caught:
        initialize(model, collect_specs(model), config.init.build(dim=32, n_layers=2), 0)
    assert [problem.key for problem in caught.value.problems] == ["model.init.rules[0]"]


def test_the_head_of_a_tied_model_is_no_parameter():
    rules = {"rules": [{"role": "head", "init": "zeros"}]}
    assert "model.init.rules[0]" in problems(rules, head={"tied": True})
    job_from_dict(tables(rules))


def test_zeros_that_nothing_can_leave():
    assert "all gradients are 0" in problems("zeros")["model.init"][0]
    job_from_dict(tables({"type": "zeros", "rules": [{"role": "hidden", "init": "normal"}]}))
    residual = {"rules": [{"match": "*.down.weight", "init": "zeros"}]}
    found = problems(residual, residual={"type": "pre", "scale": "rezero"})
    assert "model.residual.scale.type" in found["model.init.rules[0].init.type"][0]
    for scale in ("none", {"type": "rezero", "init": 0.1}):
        job_from_dict(tables(residual, residual={"type": "pre", "scale": scale}))


def test_a_model_that_cannot_be_built_is_told_once():
    found = problems({"rules": [{"match": "*.foo", "init": "normal"}]}, attention={"n_heads": 64})
    assert list(found) == ["model.attention.n_heads"]


TOML = """
[model.init]
type = "fan_in"

[[model.init.rules]]
match = "*.q.weight"
init = "zeros"

[[model.init.rules]]
role = "head"
init = { type = "fan_in", power = 1.0 }
"""


def test_toml_round_trip_and_schema(tmp_path: Path):
    path = tmp_path / "a.toml"
    path.write_text(TOML)
    job = load_job(path)
    assert job_from_toml(to_toml(job), path) == job
    resolved = job.model_dump()["model"]["init"]["rules"]
    assert [rule["init"]["type"] for rule in resolved] == ["zeros", "fan_in"]
    schema = json_schema(Job)
    json.dumps(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(tables({"rules": [{"match": "a", "init": "zeros"}]}))
    nested = {"match": "a", "init": {"type": "zeros", "rules": []}}
    for wrong in ({"mach": "a", "init": "zeros"}, {"match": "a"}, nested):
        assert not validator.is_valid(tables({"rules": [wrong]}))
    assert "match" in explain("model.init.rules", Job)
    assert "power" in explain("model.init", Job)


@pytest.mark.parametrize(
    ("line", "was", "now", "expected"),
    [
        (7, 'init = "zeros"', 'mach = "a"\ninit = "zeros"', "model.init.rules[0].mach"),
        (5, 'match = "*.q.weight"\n', "", "model.init.rules[0]"),
        (11, "power", "powr", "model.init.rules[1].init.powr"),
        (10, '"head"', '"heads"', "model.init.rules[1].role"),
        (11, "power = 1.0", "power = -1.0", "model.init.rules[1].init.power"),
        (7, '"zeros"', '"zeroes"', "model.init.rules[0].init.type"),
        (11, "power = 1.0", 'rules = [{ role = "head", init = "zeros" }]', "model.init.rules[1].init"),
        (5, "*.q.weight", "*.w.weight", "model.init.rules[0]"),
    ],
)
def test_the_line_of_a_mistake_in_a_rule(tmp_path: Path, line: int, was: str, now: str, expected: str):
    path = tmp_path / "a.toml"
    assert TOML.count(was) == 1
    path.write_text(TOML.replace(was, now))
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.file, problem.line) == (expected, str(path), line)
