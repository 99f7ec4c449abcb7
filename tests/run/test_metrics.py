"""Which steps are read, and the arithmetic of what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.facts import Clock, run_facts, step_result
from titan_lite.run.hooks import Hook, HookList, RunFacts, ValidationResult
from titan_lite.run.metrics import MetricsHook
from titan_lite.run.sink import LoggedStep, LoggedValidation, Sink, Totals

CPU = torch.device("cpu")


class Recorder(Sink):
    def __init__(self) -> None:
        self.steps: list[LoggedStep] = []
        self.validations: list[LoggedValidation] = []
        self.totals: list[Totals] = []

    def step(self, row: LoggedStep) -> None:
        self.steps.append(row)

    def validation(self, row: LoggedValidation) -> None:
        self.validations.append(row)

    def end(self, totals: Totals) -> None:
        self.totals.append(totals)


class DeviceScalar:
    """Counts how often it is brought to the host, which takes its time."""

    def __init__(self, value: float, clock: Clock | None = None, seconds: float = 0.0) -> None:
        self.value, self.clock, self.seconds = value, clock, seconds
        self.reads = 0

    def item(self) -> float:
        self.reads += 1
        if self.clock:
            self.clock.now += self.seconds
        return self.value


def run(folder: Path, done: range, log_freq: int = 10, **facts: Any) -> tuple[Recorder, list[DeviceScalar]]:
    recorder, losses = Recorder(), []
    hook = MetricsHook(log_freq, [recorder], CPU)
    hook.on_start(run_facts(folder, start_step=done.start - 1, **facts))
    for step in done:
        losses.append(DeviceScalar(float(step)))
        hook.on_step(step_result(step, loss=losses[-1], grad_norm=DeviceScalar(1.0)))
    hook.on_end("completed")
    return recorder, losses


def test_logs_first_every_log_freq_and_last_step(tmp_path: Path) -> None:
    recorder, _ = run(tmp_path, range(1, 26), steps=25)
    assert [row.step for row in recorder.steps] == [1, 10, 20, 25]
    assert [row.loss for row in recorder.steps] == [1, 10, 20, 25]


def test_unlogged_steps_do_not_wait_for_the_device(tmp_path: Path) -> None:
    _, losses = run(tmp_path, range(1, 26), steps=25)
    assert [step for step, loss in enumerate(losses, start=1) if loss.reads] == [1, 10, 20, 25]
    assert {loss.reads for loss in losses} == {0, 1}


def test_resumed_run_logs_the_same_steps(tmp_path: Path) -> None:
    recorder, losses = run(tmp_path, range(13, 26), steps=25)
    assert [row.step for row in recorder.steps] == [20, 25]
    assert losses[0].reads == 1  # ends the window of the first step, which compiles


def test_real_tensors_are_read_exactly(tmp_path: Path) -> None:
    recorder = Recorder()
    hook = MetricsHook(1, [recorder], CPU)
    hook.on_start(run_facts(tmp_path))
    loss, norm, aux = torch.tensor(1 / 3), torch.tensor(1e-3), torch.tensor(7, dtype=torch.int64)
    hook.on_step(step_result(1, loss=loss, grad_norm=norm, extra=lambda: {"aux": aux, "host": 0.25}))
    (row,) = recorder.steps
    assert (row.loss, row.grad_norm) == (loss.item(), norm.item())
    assert row.extra == {"aux": 7, "host": 0.25}


def test_rates_are_those_of_the_window_alone(tmp_path: Path) -> None:
    clock, recorder = Clock(), Recorder()
    hook = MetricsHook(4, [recorder], CPU, clock)
    hook.on_start(run_facts(tmp_path, steps=8, world_size=2, flops_per_token=1e9, peak_flops=1e12))
    hook.on_step(step_result(1, step_seconds=60.0))  # compiles
    for step in (2, 3):
        hook.on_step(step_result(step, tokens=1000, step_seconds=0.25, data_seconds=0.03))
    hook.on_validation(ValidationResult(3, 2.0, 3.0, tokens=5000, seconds=10.0))
    # The device is 1.0 s behind when its numbers are asked for.
    loss = DeviceScalar(1.0, clock, seconds=1.0)
    hook.on_step(step_result(4, loss=loss, tokens=1000, step_seconds=0.25, data_seconds=0.03))
    first, second = recorder.steps
    assert first.step_seconds == 60.0
    seconds = 3 * 0.25 + 1.0
    assert second.step_seconds == pytest.approx(seconds / 3)
    assert second.data_seconds == pytest.approx(0.03)
    assert second.tokens_per_second == pytest.approx(3000 / seconds / 2)
    assert second.tflops == pytest.approx(1e9 * 3000 / seconds / 2 / 1e12)
    assert second.mfu == pytest.approx(1e9 * 3000 / seconds / 2 / 1e12)
    assert recorder.validations[0].tokens_per_second == 5000 / 10 / 2


def test_flops_are_those_that_steps_computed(tmp_path: Path) -> None:
    """1000 tokens with half of the expected FLOPs and 3000 with twice as many: 6500 tokens' worth in a second."""
    recorder = Recorder()
    hook = MetricsHook(3, [recorder], CPU, Clock())
    hook.on_start(run_facts(tmp_path, steps=3, world_size=2, flops_per_token=1e9))
    hook.on_step(step_result(1, work=7.0))
    hook.on_step(step_result(2, tokens=1000, step_seconds=0.5, work=0.5))
    hook.on_step(step_result(3, tokens=3000, step_seconds=0.5, work=2.0))
    assert recorder.steps[-1].tokens_per_second == 2000
    assert recorder.steps[-1].tflops == pytest.approx(6500 * 1e9 / 2 / 1e12)


def test_mfu_is_unknown_without_a_peak(tmp_path: Path) -> None:
    recorder, _ = run(tmp_path, range(1, 2), peak_flops=None)
    assert recorder.steps[0].mfu is None
    assert recorder.steps[0].tflops > 0


def test_eta_counts_validation_but_not_the_first_step(tmp_path: Path) -> None:
    clock, recorder = Clock(), Recorder()
    hook = MetricsHook(10, [recorder], CPU, clock)
    hook.on_start(run_facts(tmp_path, steps=100))
    clock.now += 60
    hook.on_step(step_result(1, step_seconds=60.0))
    for step in range(2, 21):
        clock.now += 0.5
        if step == 15:
            clock.now += 9.5  # a validation pass
        hook.on_step(step_result(step, step_seconds=0.5))
    for step in range(21, 101):
        clock.now += 0.5
        hook.on_step(step_result(step, step_seconds=0.5))
    eta = {row.step: row.eta_seconds for row in recorder.steps}
    assert eta[1] == 99 * 60  # nothing else to go by
    assert eta[10] == pytest.approx(90 * 0.5)
    assert eta[20] == pytest.approx(80 * (19 * 0.5 + 9.5) / 19)
    assert eta[100] == 0


def test_totals(tmp_path: Path) -> None:
    clock, recorder = Clock(), Recorder()
    hook = MetricsHook(10, [recorder], CPU, clock)
    hook.on_start(run_facts(tmp_path, steps=100, start_step=4, world_size=2))
    for step in range(5, 13):
        clock.now += 1
        hook.on_step(step_result(step, tokens=1000, step_seconds=0.5))
    hook.on_end("stopped: SIGTERM")
    (totals,) = recorder.totals
    assert (totals.steps, totals.tokens, totals.seconds) == (8, 8000, 8.0)
    assert totals.tokens_per_second == 8000 / 4 / 2
    assert totals.last is not None
    assert totals.last.step == 10
    assert totals.validation is None


def test_run_that_fails_before_its_first_step_has_totals(tmp_path: Path) -> None:
    recorder, _ = run(tmp_path, range(1, 1))
    assert (recorder.totals[0].steps, recorder.totals[0].tokens_per_second) == (0, 0.0)


class Ended(Hook):
    def __init__(self, start: Exception | None = None, end: Exception | None = None) -> None:
        self.start, self.end = start, end
        self.reasons: list[str] = []

    def on_start(self, facts: RunFacts) -> None:
        if self.start:
            raise self.start

    def on_end(self, reason: str) -> None:
        self.reasons.append(reason)
        if self.end:
            raise self.end


def test_every_hook_is_ended_even_if_one_fails(tmp_path: Path) -> None:
    hooks = [Ended(), Ended(end=OSError("disk full")), Ended()]
    both = HookList(hooks)
    both.on_start(run_facts(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        both.on_end("completed")
    assert [hook.reasons for hook in hooks] == [["completed"]] * 3


def test_only_started_hooks_are_ended(tmp_path: Path) -> None:
    hooks = [Ended(), Ended(start=OSError("no such disk")), Ended()]
    both = HookList(hooks)
    with pytest.raises(OSError, match="no such disk"):
        both.on_start(run_facts(tmp_path))
    both.on_end("failed")
    assert [hook.reasons for hook in hooks] == [["failed"], [], []]
