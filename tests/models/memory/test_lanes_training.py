"""What rows remember in training belongs to them, whatever the layout: both memories, in one process and two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, train
from tests.training.test_layouts import assert_equal_runs
from titan_lite.config.load import load_job
from titan_lite.run.signals import StopFlag
from titan_lite.trainer import Trainer

STEPS = 5
XL: dict[str, Any] = {"type": "xl", "length": 20}
"""More than a segment of 16 tokens."""
LONG: dict[str, Any] = {"type": "long_term", "length": 8, "segment": 4, "segments": 6, "retrieve": 2}
MEMORIES = {"xl": XL, "long_term": LONG}


def sections(local_batch_size: int, memory: Any, **more: dict[str, Any]) -> dict[str, Any]:
    """A tiny run's, with this memory."""
    model = {"memory": memory, "attention": {"n_heads": 4, "n_kv_heads": 2, "position": {"theta": 100.0}}}
    return {"model": model, "training": {"local_batch_size": local_batch_size, "global_batch_size": 8}} | more


@pytest.fixture(scope="module", params=MEMORIES)
def serial(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Run]:
    """A memory, and a run with it in one process and micro-batch."""
    memory = MEMORIES[request.param]
    return memory, train(sections(8, memory), STEPS)


@pytest.mark.parametrize("local_batch_size", [4, 3])
def test_each_accumulation_slot_has_its_own(serial: tuple[dict[str, Any], Run], local_batch_size: int) -> None:
    memory, run = serial
    assert_equal_runs(train(sections(local_batch_size, memory), STEPS), run)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"recompute_kv": True}, {"activation_checkpoint": {"mode": "full"}}),
        (
            {"reset_on_bos": True},
            {
                "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
                "compile": {"enable": True, "backend": "aot_eager"},
            },
        ),
    ],
    ids=["keys", "inputs, recomputed", "documents, compiled"],
)
def test_fsdp_equals_one_process(pool2, name: str, options: dict[str, Any], more: dict[str, Any]) -> None:
    memory = MEMORIES[name] | options
    reference = train(sections(8, memory), STEPS)
    for run in pool2.run(train, sections(2, memory, **more), STEPS):
        assert_equal_runs(run, reference)


def go(config: Path, folder: Path, *overrides: str) -> int:
    """Runs a config file in this folder; the exit code."""
    return Trainer(load_job(config, [f"--job.dump_folder={folder}", *overrides]), StopFlag()).run()


def write_config(folder: Path, text: str, longest: int) -> Path:
    """The text as a file, where DOCUMENTS stands for one of documents of up to so many words."""
    rows = [json.dumps({"text": f"document {i} " + "abc def " * (i % longest)}) for i in range(200)]
    (folder / "documents.jsonl").write_text("\n".join(rows))
    (folder / "config.toml").write_text(text.replace("DOCUMENTS", str(folder / "documents.jsonl")))
    return folder / "config.toml"


def logged(folder: Path, key: str = "loss") -> list[float]:
    """A number of every line of the run's metrics that has it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
