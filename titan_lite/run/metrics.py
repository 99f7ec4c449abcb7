"""Reads every logged step once, works out rates, and hands the result to the sinks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from titan_lite.run.device import read_memory, reset_peak_memory
from titan_lite.run.hooks import Hook, RunFacts, StepResult, ValidationResult
from titan_lite.run.meter import Meter, Window
from titan_lite.run.sink import LoggedStep, LoggedValidation, Sink, Totals


def is_logged(step: int, log_freq: int, last_step: int) -> bool:
    """Whether the numbers of this step are read from the device: the first step, every `log_freq`-th and the last."""
    return step == 1 or step % log_freq == 0 or step == last_step


class MetricsHook(Hook):
    """Logs to `sinks` (on some ranks there are none). Every rank reads the same steps, so a read may be collective."""

    def __init__(
        self,
        log_freq: int,
        sinks: Sequence[Sink],
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.log_freq = log_freq
        self.sinks = tuple(sinks)
        self.device = device
        self.clock = clock
        self._last: LoggedStep | None = None
        self._validation: LoggedValidation | None = None

    def on_start(self, facts: RunFacts) -> None:
        self.facts = facts
        self.meter = Meter(self.clock)
        reset_peak_memory(self.device)
        for sink in self.sinks:
            sink.start(facts)

    def on_step(self, result: StepResult) -> None:
        self.meter.add(result)
        logged = is_logged(result.step, self.log_freq, self.facts.steps)
        # The first step of every process compiles and warms up: it gets a window of its own even where it is not shown.
        if not (logged or result.step == self.facts.start_step + 1):
            return
        asked = self.clock()
        numbers = result.read()
        self.meter.add_wait(self.clock() - asked)
        window = self.meter.close(result.step)
        if not logged:
            return
        speed = self._tokens_per_second(window)
        flops = window.work / window.step_seconds / self.facts.world_size * self.facts.flops_per_token
        peak = self.facts.peak_flops
        self._last = LoggedStep(
            step=result.step,
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            lr=result.lr,
            tokens_seen=result.tokens_seen,
            tokens_per_second=speed,
            tflops=flops / 1e12,
            mfu=None if peak is None else flops / peak,
            memory=read_memory(self.device),
            data_seconds=window.data_seconds / window.steps,
            step_seconds=window.step_seconds / window.steps,
            eta_seconds=self.meter.eta_seconds(result.step, self.facts.steps),
            extra=numbers.extra,
        )
        reset_peak_memory(self.device)
        for sink in self.sinks:
            sink.step(self._last)

    def on_validation(self, result: ValidationResult) -> None:
        self._validation = LoggedValidation(
            step=result.step,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            tokens_per_second=result.tokens / result.seconds / self.facts.world_size,
            memory=read_memory(self.device),
            extra=result.extra,
        )
        reset_peak_memory(self.device)
        for sink in self.sinks:
            sink.validation(self._validation)

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        for sink in self.sinks:
            sink.checkpoint(step, path, seconds)

    def on_end(self, reason: str) -> None:
        done = self.meter.total + self.meter.window
        totals = Totals(
            reason=reason,
            steps=done.steps,
            tokens=done.tokens,
            seconds=self.meter.elapsed(),
            tokens_per_second=self._tokens_per_second(done),
            last=self._last,
            validation=self._validation,
        )
        for sink in self.sinks:
            sink.end(totals)

    def _tokens_per_second(self, window: Window) -> float:
        return window.tokens / window.step_seconds / self.facts.world_size if window.steps else 0.0
