"""Sinks: where logged numbers go (console, metrics.jsonl, TensorBoard, Weights & Biases)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from titan_lite.run.device import Memory
from titan_lite.run.hooks import RunFacts


@dataclass(frozen=True)
class LoggedStep:
    """One logged step. Rates and times are means over the steps since the previous logged one (or since the start)."""

    step: int
    loss: float
    """Of this very step, over the global batch."""
    grad_norm: float
    lr: float
    tokens_seen: int
    tokens_per_second: float
    """Per device."""
    tflops: float
    """Model TFLOP/s per device."""
    mfu: float | None
    """Share of the device's peak in [0, 1]; None where the peak is unknown."""
    memory: Memory
    data_seconds: float
    step_seconds: float
    eta_seconds: float
    extra: dict[str, float]


@dataclass(frozen=True)
class LoggedValidation:
    """One validation pass."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens_per_second: float
    """Per device."""
    memory: Memory
    extra: Mapping[str, float] = field(default_factory=dict)
    """What the objective adds."""


@dataclass(frozen=True)
class Cost:
    """Of one step on one rank."""

    live_gib: float | None
    """Peak of what is allocated; None where it was not measured."""
    reserved_gib: float | None
    """Peak of what the allocator holds; None on a CPU."""
    step_seconds: float


@dataclass(frozen=True)
class LoggedComparison:
    """A measured step beside what was estimated."""

    step: int
    measured: Cost
    estimated: Cost
    doubts: tuple[str, ...]
    """Where they are far apart: which term to look at."""


@dataclass(frozen=True)
class Totals:
    """What this process did from its start to its end."""

    reason: str
    steps: int
    tokens: int
    seconds: float
    """Wall time, with validation and checkpoints."""
    tokens_per_second: float
    """Per device, of the steps alone."""
    last: LoggedStep | None
    validation: LoggedValidation | None


class Sink:
    """Does nothing with what it is given; subclasses write it somewhere."""

    def start(self, facts: RunFacts) -> None:
        """Called before the first step."""

    def step(self, row: LoggedStep) -> None:
        """Called with every logged step."""

    def validation(self, row: LoggedValidation) -> None:
        """Called with every validation pass."""

    def comparison(self, row: LoggedComparison) -> None:
        """Called at most once in a process's life, when the estimate is there."""

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Called with every checkpoint."""

    def end(self, totals: Totals) -> None:
        """Called once, however the run ends; closes what is open."""
