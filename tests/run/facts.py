"""Stand-ins for what the trainer tells its hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_lite.run.device import Memory
from titan_lite.run.hooks import RunFacts, StepResult
from titan_lite.run.sink import LoggedStep, LoggedValidation


def run_facts(folder: Path, **changes: Any) -> RunFacts:
    facts = RunFacts(
        description="debug run",
        model="llama3 debugmodel",
        parameters=6_163_456,
        parameters_without_embedding=6_032_384,
        flops_per_token=41_234_567,
        layout="FSDP 2",
        kernels="flex x 5, sdpa x 1",
        device="NVIDIA A100-SXM4-80GB",
        peak_flops=312e12,
        world_size=2,
        dp_size=2,
        local_batch_size=8,
        global_batch_size=32,
        accumulation=2,
        seq_len=512,
        steps=400,
        start_step=0,
        data="python_stdlib",
        dump_folder=folder,
    )
    return replace(facts, **changes)


def step_result(step: int, **changes: Any) -> StepResult:
    result = StepResult(
        step=step,
        loss=4.0 + 1 / (3 * step),
        grad_norm=0.1 + 0.2,
        lr=8e-4 / 3,
        tokens_seen=1000 * step,
        tokens=1000,
        data_seconds=0.0625,
        step_seconds=0.5,
    )
    return replace(result, **changes)


def logged_step(step: int = 10, **changes: Any) -> LoggedStep:
    row = LoggedStep(
        step=step,
        loss=4.7215,
        grad_norm=0.28041,
        lr=8e-4,
        tokens_seen=10_000,
        tokens_per_second=5847.4,
        tflops=0.1234,
        mfu=None,
        memory=Memory(reserved_gib=1.234, capacity_gib=24.1),
        data_seconds=0.0625,
        step_seconds=0.5,
        eta_seconds=750.2,
        extra={},
    )
    return replace(row, **changes)


def logged_validation(step: int = 100, **changes: Any) -> LoggedValidation:
    row = LoggedValidation(
        step=step,
        loss=2.123456,
        bits_per_byte=3.0635,
        tokens_per_second=12_345.6,
        memory=Memory(reserved_gib=1.234, capacity_gib=24.1),
    )
    return replace(row, **changes)


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
