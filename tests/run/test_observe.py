"""A whole run seen through the hooks that a config asks for."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.run.facts import run_facts, step_result
from titan_lite.config.errors import ConfigError
from titan_lite.job import Job
from titan_lite.run.config import JobInfo, Metrics, Profiling, Training
from titan_lite.run.hooks import ValidationResult
from titan_lite.run.observe import build_hooks

CPU = torch.device("cpu")


def job(folder: Path, metrics: dict[str, Any] | None = None, profiling: dict[str, Any] | None = None) -> Job:
    sections = SimpleNamespace(
        job=JobInfo(dump_folder=str(folder)),
        metrics=Metrics(log_freq=2, **(metrics or {})),
        profiling=Profiling(profile_freq=2, profiler_warmup=1, **(profiling or {})),
        training=Training(gc_freq=2),
        model_dump=lambda mode: {},
    )
    return cast(Job, sections)


def train(folder: Path, job: Job, rank: int = 0) -> None:
    hooks = build_hooks(job, rank, CPU)
    hooks.on_start(run_facts(folder, steps=3))
    for step in (1, 2, 3):
        hooks.on_step(step_result(step))
    hooks.on_validation(ValidationResult(3, 2.0, 3.0, tokens=10, seconds=1.0))
    hooks.on_checkpoint(3, folder / "checkpoint/step-3", 0.1)
    hooks.on_end("completed")
    assert gc.isenabled()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)).partition(".tfevents")[0] for path in folder.rglob("*.*"))


def test_by_default_only_metrics_are_written(tmp_path: Path) -> None:
    train(tmp_path, job(tmp_path))
    assert files(tmp_path) == ["metrics.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (3, True), (3, False)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    train(tmp_path, job(tmp_path, {"enable_tensorboard": True}), rank=1)
    assert files(tmp_path) == []


def test_tensorboard_and_traces_go_where_the_config_says(tmp_path: Path) -> None:
    asked = job(tmp_path, {"enable_tensorboard": True, "save_tb_folder": "board"}, {"enable_profiling": True})
    train(tmp_path, asked)
    assert files(tmp_path) == [
        "board/events.out",
        "metrics.jsonl",
        "profile_traces/iteration_2/rank0_trace.json",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_has_its_own_folder_if_asked(tmp_path: Path, rank: int) -> None:
    train(tmp_path, job(tmp_path, {"enable_tensorboard": True, "save_for_all_ranks": True}), rank)
    assert f"tb/rank_{rank}/events.out" in files(tmp_path)
    assert ("metrics.jsonl" in files(tmp_path)) == (rank == 0)


def test_memory_snapshots_are_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="enable_memory_snapshot"):
        build_hooks(job(tmp_path, profiling={"enable_memory_snapshot": True}), 0, CPU)
