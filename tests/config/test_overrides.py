"""`--section.key=value` on the command line."""

from __future__ import annotations

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import load_job
from titan_lite.config.paths import get

ACCEPTED = [
    (["--training.steps=7"], "training.steps", 7),
    (["--training.steps", "7"], "training.steps", 7),
    (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
    (["--training.steps=7", "--training.steps=8"], "training.steps", 8),
    (["--optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
    (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
    (["--job.description=10"], "job.description", "10"),
    (["--job.description", 'a = "b"'], "job.description", 'a = "b"'),
    (["--job.description="], "job.description", ""),
    (["--training.dtype=bfloat16"], "training.dtype", "bfloat16"),
    (["--checkpoint.enable"], "checkpoint.enable", True),
    (["--checkpoint.enable", "false"], "checkpoint.enable", False),
    (["--checkpoint.enable=true"], "checkpoint.enable", True),
    (["--checkpoint.enable", "--training.steps=3"], "checkpoint.enable", True),
    (["--checkpoint.no_initial_load_model_only"], "checkpoint.initial_load_model_only", False),
    (["--generation.prompts=a,b"], "generation.prompts", ("a", "b")),
    (["--generation.prompts", '["a, b"]'], "generation.prompts", ("a, b",)),
    (["--generation.prompts="], "generation.prompts", ()),
    (["--compile.components=loss"], "compile.components", ("loss",)),
    (["--model.attention.n_heads=4"], "model.attention.n_heads", 4),
    (["--model.attention={n_heads = 4, n_kv_heads = 2}"], "model.attention.n_kv_heads", 2),
    (["--tokenizer=bytes"], "tokenizer.type", "bytes"),
    (["--data.source=huggingface", "--data.source.path=org/set"], "data.source.path", "org/set"),
    (["--data.source.path=org/set", "--data.source.type=huggingface"], "data.source.path", "org/set"),
    (["--data.source.path=org/set", "--data.source=huggingface"], "data.source.path", "org/set"),
    (["--data.source.type=files", "--data.source.path=8"], "data.source.path", "8"),
    (["--data.source.type=files", '--data.source.path=["8", "9"]'], "data.source.path", ("8", "9")),
    (["--training.dataset=c4"], "data.source.path", "allenai/c4"),
    (["--training.compile"], "compile.enable", True),
    (["--checkpoint.no_enable_checkpoint"], "checkpoint.enable", False),
    (["--training.batch_size", "2"], "training.local_batch_size", 2),
    (["--optimizer.name=AdamW"], "optimizer.type", "adamw"),
    (["--model.name=llama3", "--model.flavor=8B"], "model.dim", 4096),
]


@pytest.mark.parametrize(("overrides", "key", "expected"), ACCEPTED, ids=[" ".join(case[0]) for case in ACCEPTED])
def test_override(write, overrides, key, expected) -> None:
    job = load_job(write(""), overrides, files=False)
    value = get(job.model_dump(), tuple(key.split(".")))
    assert (value, type(value)) == (expected, type(expected))


REFUSED = [
    (["--training.stepz=7"], "E001", "training.stepz"),
    (["--trainin.steps=7"], "E001", "trainin"),
    (["--training.steps=ten"], "E002", "training.steps"),
    (["--training.steps="], "E002", "training.steps"),
    (["--training.steps=1\nlocal_batch_size=2"], "E002", "training.steps"),
    (["--checkpoint.enable=yes"], "E002", "checkpoint.enable"),
    (["--optimizer.lr=0"], "E003", "optimizer.lr"),
    (["--training.dtype=int8"], "E003", "training.dtype"),
    (["--model.norm=layernrm"], "E004", "model.norm.type"),
    (["--training.steps"], "E012", "training.steps"),
    (["--training.steps", "--training.seq_len=3"], "E012", "training.steps"),
    (["--training.no_steps"], "E012", "training.no_steps"),
    (["training.steps=7"], "E012", ""),
    (["--training..steps=7"], "E012", ""),
    (["--"], "E012", ""),
    (["--training.steps=4", "--training.steps.x=3"], "E012", "training.steps.x"),
]


@pytest.mark.parametrize(("overrides", "code", "key"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_bad_override(write, overrides, code, key) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(write(""), overrides)
    assert [(p.code, p.key, p.file, p.line) for p in caught.value.problems] == [(code, key, "command line", 0)]


def test_file_and_command_line_are_reported_together(write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(write("[training]\nstepz = 1"), ["--metrics.log_frq=1", "oops"])
    assert {(p.code, p.line) for p in caught.value.problems} == {("E001", 2), ("E001", 0), ("E012", 0)}
