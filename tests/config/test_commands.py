"""check_config.py, --schema, --explain, and how entry points end on a ConfigError."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from titan_lite.config.check_config import main
from titan_lite.config.component import slots
from titan_lite.config.errors import ConfigError, main_guard
from titan_lite.config.explain import explain, json_schema
from titan_lite.config.load import load_job, to_toml
from titan_lite.config.schema import all_keys
from titan_lite.job import Job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def test_check_config_says_ok(write, capsys) -> None:
    assert main([str(write("[training]\nbatch_size = 3"))]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("config.toml: ok\n")
    assert err.count("warning: ") == 1


def test_check_config_json(write, capsys) -> None:
    file = write("[training]\nglobal_batch_size = 3\nbatch_size = 2")
    assert main([str(file), "--world-size", "2", "--json", "--metrics.log_frq=1"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert len(found["warnings"]) == 1
    assert [(p["code"], p["file"], p["line"], p["key"]) for p in found["problems"]] == [
        ("E005", str(file), 2, "training.global_batch_size"),
        ("E001", "command line", 0, "metrics.log_frq"),
    ]
    assert found["problems"][1]["nearest"] == "log_freq"
    assert main([str(write("")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": [], "warnings": []}


def test_check_config_script_shows_no_traceback(write) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_config.py"), str(write("[training]\nstepz = 1"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "config.toml:2  training.stepz = 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


SLOW_IMPORTS = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch._dynamo", "sympy", "datasets")
SLOW_IMPORTS += ("transformers", "tokenizers", "sentencepiece", "tiktoken", "tensorboard", "pyarrow", "pandas")


def test_checking_a_config_imports_little_beyond_torch(write) -> None:
    """What makes the check slow is what it imports: benchmarks/startup.py has the seconds."""
    path = write('[model]\nname = "llama3"\nflavor = "debugmodel"')
    code = f"""
import sys, torch
before = set(sys.modules)
from titan_lite.config.check_config import main
assert main([{str(path)!r}, "--world-size", "8"]) == 0
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(SLOW_IMPORTS) & set(done.stdout.split()) == set()


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    shell = f"{sys.executable} -m titan_lite.config --schema | head -c 10"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_the_schema_is_json_schema_and_accepts_what_is_accepted(write) -> None:
    schema = json_schema(Job)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    text = '[model]\nname = "llama3"\nflavor = "8B"\n[[model.layers]]\nat = "::2"\nattention.position.theta = 7.0'
    assert list(validator.iter_errors(tomllib.loads(text))) == []
    config = tomllib.loads(to_toml(load_job(write(text))))
    assert config["model"]["layers"][0]["attention"]["n_kv_heads"] == 8
    assert list(validator.iter_errors(config)) == []  # visits every part, so that all references resolve
    assert list(validator.iter_errors({"base": "x.toml", "tokenizer": "bytes"})) == []
    for wrong in ({"training": {"stepz": 1}}, {"training": {"steps": 0}}, {"model": {"norm": "layernrm"}}):
        assert list(validator.iter_errors(wrong))


def test_every_key_is_documented() -> None:
    assert {family.slot for family in slots()} >= {"norm", "attention", "optimizer", "tokenizer", "source"}
    undocumented = [
        f"{cls.__qualname__}.{name}"
        for family in slots()
        for cls in family.choices.values()
        for name, field in cls.model_fields.items()
        if name != "type" and not field.description
    ]
    sections = [field.annotation for field in Job.model_fields.values()]
    undocumented += [
        f"{cls.__qualname__}.{name}"
        for cls in sections
        for name, field in cls.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


def test_explain() -> None:
    text = explain("model.attention", Job)
    assert 'type = "gqa"  (default)' in text
    assert "n_heads  int  default 8  0 < value" in text
    assert "Query heads H." in text
    assert "default 8  0 < value" in explain("training.local_batch_size", Job)
    assert {line.split()[0] for line in explain("", Job).split("\n")} >= {"job", "model", "training"}
    layers = explain("model.layers", Job)
    assert layers.startswith("[[model.layers]]  What differs in some layers: tables merge")
    assert "  at  int or string  required" in layers
    assert "sequential" in layers
    assert "default unset" in layers
    assert 'type = "document"' in explain("model.attention.masks", Job)
    assert 'type = "mlp"' in explain("model.layers[0].ffn", Job)
    for path in all_keys(Job):
        assert explain(".".join(path), Job)
    with pytest.raises(ConfigError, match=r"did you mean `model\.attention`"):
        explain("model.atention", Job)


def test_main_guard_prints_and_exits_with_2(capsys) -> None:
    @main_guard()
    def entry() -> None:
        raise ConfigError.at("training.steps", "is \x1b[31mbad", value="\x07", allowed="less")

    with pytest.raises(SystemExit) as caught:
        entry()
    assert caught.value.code == 2
    assert capsys.readouterr().err == ('E013  training.steps = "\\x07"\n    is \\x1b[31mbad\n    allowed: less\n')


def test_a_config_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ConfigError.at("data.source", "is empty", value=3)))
    assert str(error) == str(ConfigError.at("data.source", "is empty", value=3))
    assert pickle.loads(pickle.dumps(ConfigError.at("x", "y"))).problems == ConfigError.at("x", "y").problems
