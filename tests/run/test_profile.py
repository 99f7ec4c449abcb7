"""Traces appear at the right steps with the right contents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.run.facts import run_facts, step_result
from titan_lite.config.errors import ConfigError
from titan_lite.run.config import Profiling
from titan_lite.run.profile import MemorySnapshotHook, ProfilerHook

CPU = torch.device("cpu")
CONFIG = Profiling(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)


def train(folder: Path, start: int, stop: int, last: int = 12, rank: int = 0) -> None:
    hook = ProfilerHook(CONFIG, folder, rank, CPU)
    hook.on_start(run_facts(folder, start_step=start, steps=last))
    for step in range(start + 1, stop + 1):
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(4) + 1
        hook.on_step(step_result(step))
    hook.on_end("completed")


def traces(folder: Path) -> dict[str, list[int]]:
    """The steps each trace shows."""
    found = {}
    for path in sorted((folder / "profile_traces").rglob("*.json")):
        names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        steps = sorted(int(name.split()[-1]) for name in names if name.startswith("work of step"))
        found[str(path.relative_to(folder / "profile_traces"))] = steps
    return found


def test_traces_show_the_steps_before_each_multiple_of_freq(tmp_path: Path) -> None:
    train(tmp_path, 0, 9)
    assert traces(tmp_path) == {"iteration_4/rank0_trace.json": [3, 4], "iteration_8/rank0_trace.json": [7, 8]}


def test_a_resumed_run_keeps_the_rhythm(tmp_path: Path) -> None:
    train(tmp_path, 5, 9, rank=3)
    assert traces(tmp_path) == {"iteration_8/rank3_trace.json": [7, 8]}


def test_a_run_that_stops_while_recording_keeps_what_it_has(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    assert traces(tmp_path) == {"iteration_3/rank0_trace.json": [3]}


def test_a_run_that_ends_as_recording_begins_writes_no_empty_trace(tmp_path: Path) -> None:
    train(tmp_path, 0, 6)
    assert traces(tmp_path) == {"iteration_4/rank0_trace.json": [3, 4]}


def test_a_run_too_short_for_a_trace_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 8, 9, last=11)
    assert "the first would be of step 12, the last step is 11" in caplog.text
    assert traces(tmp_path) == {}


def test_memory_snapshots_need_cuda(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profiling\.enable_memory_snapshot"):
        MemorySnapshotHook(CONFIG, tmp_path, 0, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_snapshots_on_cuda(tmp_path: Path) -> None:
    hook = MemorySnapshotHook(CONFIG, tmp_path, 0, torch.device("cuda"))
    hook.on_start(run_facts(tmp_path))
    for step in range(1, 6):
        torch.ones(1000, device="cuda")
        hook.on_step(step_result(step))
    hook.on_end("failed: OutOfMemoryError")
    names = sorted(path.parent.name for path in tmp_path.rglob("rank0_memory_snapshot.pickle"))
    assert names == ["iteration_4", "iteration_5_exit"]
