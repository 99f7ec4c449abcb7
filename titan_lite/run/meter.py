"""Arithmetic of speed: throughput over the logging window and the time to the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from titan_lite.run.hooks import StepResult


@dataclass(frozen=True)
class Window:
    """Sums over the steps of one logging window."""

    steps: int = 0
    tokens: int = 0
    data_seconds: float = 0.0
    step_seconds: float = 0.0
    work: float = 0.0
    """Tokens, each weighted with its step's `work`."""

    def __add__(self, other: Window) -> Window:
        return Window(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.data_seconds + other.data_seconds,
            self.step_seconds + other.step_seconds,
            self.work + other.work,
        )


class Meter:
    """Adds up steps. A window's time is what its steps took, without the validation and checkpoints between them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started = clock()
        self.window = Window()
        self.total = Window()
        self._first_done: tuple[int, float] | None = None
        self._last_step_seconds = 0.0

    def add(self, result: StepResult) -> None:
        """Counts a finished step in."""
        self.window += Window(1, result.tokens, result.data_seconds, result.step_seconds, result.tokens * result.work)

    def add_wait(self, seconds: float) -> None:
        """Counts in the wait for a device that was still computing the window's steps."""
        self.window += Window(step_seconds=seconds)

    def close(self, step: int) -> Window:
        """Ends the window with this step, which the device has finished, and starts the next one."""
        window, self.window = self.window, Window()
        self.total += window
        self._last_step_seconds = window.step_seconds / window.steps
        if self._first_done is None:
            self._first_done = step, self.clock()
        return window

    def eta_seconds(self, step: int, last_step: int) -> float:
        """Seconds to the end: remaining steps times the mean wall time per step since this process's first one.

        Validation and checkpoints are in that mean, because they will come again; the first step, which compiles, is
        not. Until a second window is closed there is only the first one to go by.
        """
        per_step = self._last_step_seconds
        if self._first_done is not None and step > self._first_done[0]:
            first, when = self._first_done
            per_step = (self.clock() - when) / (step - first)
        return per_step * (last_step - step)

    def elapsed(self) -> float:
        """Wall seconds since this process started counting."""
        return self.clock() - self.started
