"""A run beside its estimate: what is measured, what is said where they differ, and that no run waits or fails."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.facts import run_facts, step_result
from tests.runs import build_tiny, global_batch
from titan_lite.config.load import load_job
from titan_lite.run.console import ConsoleSink
from titan_lite.run.estimate import LONG_ENOUGH_SECONDS, LOW_PRIORITY, EstimateHook, compared, peak_of_events
from titan_lite.run.facts import resting_bytes
from titan_lite.run.signals import StopFlag
from titan_lite.run.sink import Cost, LoggedComparison, Sink
from titan_lite.step import step
from titan_lite.trainer import Trainer

CPU = torch.device("cpu")
TOLERANCE = 0.02
"""Of the peak memory of a real step."""

ESTIMATE: dict[str, Any] = {
    "peak_live_gib": 10.0,
    "peak_reserved_gib": 12.0,
    "peak_reserved_expandable_gib": 11.0,
    "step_seconds": 0.5,
    "categories": {"parameters": 2.0, "optimizer state": 4.0, "activations": 3.0, "loss": 1.0},
    "peak_at": {"phase": "forward", "unit": "head"},
    "peak_is_upper_bound": False,
    "seconds_by_kind": {"matmul": 0.3, "pointwise": 0.1},
    "communication": {"dp_shard": {"seconds": 0.2}},
    "not_modelled": ["compile.enable: counts as eager"],
}


class Kept(Sink):
    def __init__(self) -> None:
        self.rows: list[LoggedComparison] = []

    def comparison(self, row: LoggedComparison) -> None:
        self.rows.append(row)


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


PRINTS = python(f"print({json.dumps(json.dumps(ESTIMATE))})")


def run(folder: Path, hook: EstimateHook, steps: int = 3, reason: str = "completed", **facts: Any) -> None:
    hook.on_start(run_facts(folder, steps=steps, resting_bytes=lambda: 6 * 2**30, **facts))
    for number in range(1, steps + 1):
        hook.on_step(step_result(facts.get("start_step", 0) + number))
    hook.on_end(reason)


def test_a_third_step_and_its_estimate(tmp_path: Path) -> None:
    """On a CPU: what rests, the allocator's peak of the second step, the time of the third."""
    kept = Kept()
    hook = EstimateHook(True, [kept], CPU, command=PRINTS)
    hook.on_start(run_facts(tmp_path, steps=3, resting_bytes=lambda: 6 * 2**30))
    hook.on_step(step_result(1))
    held = [torch.empty(2**20) for _ in range(3)]
    del held
    hook.on_step(step_result(2))
    hook.on_step(step_result(3, step_seconds=0.25))
    hook.on_end("completed")
    (row,) = kept.rows
    assert row.step == 3
    assert row.measured.live_gib == pytest.approx(6 + 3 * 2**22 / 2**30, abs=1e-5)
    assert (row.measured.reserved_gib, row.measured.step_seconds) == (None, 0.25)
    assert row.estimated == Cost(10.0, None, 0.5)


def test_the_estimate_is_of_the_run_as_it_is(tmp_path: Path) -> None:
    said = tmp_path / "arguments.json"
    command = python(f"import json, sys, os; json.dump([*sys.argv, os.nice(0)], open({str(said)!r}, 'w')); sys.exit(1)")
    hook = EstimateHook(False, [], CPU, False, command)
    hook.on_start(run_facts(tmp_path, start_step=40, world_size=16, global_batch_size=96))
    for number in (41, 42, 43):
        hook.on_step(step_result(number))
    assert hook._process is not None
    hook._process.wait()
    hook.on_end("completed")
    arguments = json.loads(said.read_text())
    assert arguments[1:4] == [str(tmp_path / "config.toml"), "--world-size", "16"]
    assert "--training.global_batch_size=96" in arguments
    assert arguments[arguments.index("--device") + 1] == "cpu"
    assert arguments[-1] == LOW_PRIORITY


def test_a_run_that_is_soon_done_is_not_compared(tmp_path: Path) -> None:
    command = python("raise SystemExit(1)")
    hook = EstimateHook(False, [], CPU, command=command)
    run(tmp_path, hook)
    assert hook._profile is None
    assert hook._process is None
    hook.on_start(run_facts(tmp_path, steps=1 + round(LONG_ENOUGH_SECONDS / 0.5)))
    hook.on_step(step_result(1))
    assert hook._profile is not None
    hook.on_end("failed")


def test_no_run_waits_for_it_unless_asked_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for always, reason in ((False, "completed"), (True, "stopped: SIGTERM")):
        hook = EstimateHook(always, [], CPU, False, python("import time; time.sleep(600)"))
        facts = run_facts(tmp_path, steps=1000)
        hook.on_start(facts)
        for number in range(1, 9):
            hook.on_step(step_result(number))
        hook.on_end(reason)
        assert hook._process is not None
        assert hook._process.poll() is not None  # gone, not left behind
    assert "ended before its estimate" in caplog.text


def test_what_goes_wrong_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, EstimateHook(True, [], CPU, False, python("raise SystemExit('no such device')")))
    assert "no such device" in caplog.text
    for unreadable in ("print('nothing')", "print('{}')"):
        run(tmp_path, EstimateHook(True, [], CPU, False, python(unreadable)))
    assert caplog.text.count("cannot be read") == 2
    run(tmp_path, EstimateHook(True, [], CPU, False, ("/nowhere/python",)))
    assert "/nowhere/python" in caplog.text


@pytest.mark.parametrize(
    ("measured", "rest", "said"),
    [
        (Cost(10.5, 12.5, 0.52), 6.0, []),
        (Cost(12.0, 14.0, 0.5), 6.0, ["look at activations, estimated 3.000 GiB at the peak in forward of head"]),
        (Cost(14.0, 14.0, 0.5), 9.0, ["look at what rests between steps, measured 9.000 GiB, estimated 6.000"]),
        (Cost(10.0, 14.0, 0.5), 6.0, ["reserved memory"]),
        (Cost(10.0, 12.0, 0.8), 6.0, ["step time: look at matmul, estimated 0.3000 s"]),
        (Cost(20.0, 14.0, 0.8), 6.0, ["live memory", "step time"]),
        (Cost(10.0, None, 5.0), 6.0, []),  # a CPU's rates were measured while it trained
    ],
)
def test_differences_name_their_term(measured: Cost, rest: float, said: list[str]) -> None:
    doubts = compared(3, measured, rest, ESTIMATE).doubts
    assert len(doubts) == len(said)
    for doubt, words in zip(doubts, said, strict=True):
        assert words in doubt


def test_an_upper_bound_names_what_it_leaves_out() -> None:
    (doubt,) = compared(3, Cost(7.0, 12.0, 0.5), 6.0, ESTIMATE | {"peak_is_upper_bound": True}).doubts
    assert doubt.endswith("not modelled: compile.enable: counts as eager")


def test_expandable_segments_have_their_own_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert compared(3, Cost(10.0, 11.0, 0.5), 6.0, ESTIMATE).estimated.reserved_gib == 11.0


def test_the_console_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ConsoleSink().comparison(LoggedComparison(2, Cost(10.5, 12.0, 0.55), Cost(10.0, 12.0, 0.5), ("look here",)))
    line, doubt = (record.getMessage() for record in caplog.records)
    assert line == (
        "Step 2 and its estimate  live memory: 10.500 GiB (estimated 10.000, +5.0%)  "
        "reserved memory: 12.000 GiB (estimated 12.000, +0.0%)  step: 0.550 s (estimated 0.500, +10.0%)"
    )
    assert doubt == "Step 2 is not as estimated. look here"
    assert caplog.records[1].levelno == logging.WARNING


def test_resting_bytes_by_hand() -> None:
    """Parameters, twice as much for Adam, and its float32 count of steps for each of them."""
    _, training = build_tiny({})
    step(training, [global_batch(0)], 100.0, 0)
    sizes = [parameter.numel() for parameter in training.model.parameters()]
    assert resting_bytes(training) == 3 * 4 * sum(sizes) + 4 * len(sizes)


def test_the_profiler_sees_every_allocation() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.empty(1000)
        del first
        _kept = torch.empty(500), torch.empty(700)
    assert peak_of_events(profile) == 4 * 1200


CONFIG = """
[model]
dim = 64
n_layers = 2
vocab_size = 256
[data]
source = { type = "files", path = "TEXT" }
held_out = 0.0
[training]
local_batch_size = 4
seq_len = 64
steps = 4
mixed_precision_param = "float32"
loss_chunk_tokens = 0
[activation_checkpoint]
mode = "none"
[metrics]
compare_with_estimate = "always"
"""


def test_a_real_run_is_as_estimated(tmp_path: Path) -> None:
    """The allocator's peak in a step of a run against the estimate that a process of its own makes."""
    text = tmp_path / "text.txt"
    text.write_text("abc def ghi. " * 2000)
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.replace("TEXT", str(text)))
    job = load_job(config, [f"--job.dump_folder={tmp_path / 'out'}"], 1)
    assert Trainer(job, StopFlag()).run() == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if "measured_live_gib" in line)
    assert line["step"] == 3
    assert line["measured_live_gib"] == pytest.approx(line["estimated_live_gib"], rel=TOLERANCE)
    assert line["measured_reserved_gib"] is None
    assert min(line["measured_step_seconds"], line["estimated_step_seconds"]) > 0
