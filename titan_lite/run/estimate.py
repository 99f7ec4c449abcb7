"""A plan against reality: an early step's memory and time beside what `python -m estimation` says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from titan_lite.run.device import GIB
from titan_lite.run.hooks import Hook, RunFacts, StepResult
from titan_lite.run.logging import logger
from titan_lite.run.sink import Cost, LoggedComparison, Sink

LONG_ENOUGH_SECONDS = 60.0
"""With "auto", a run that has less to go is over before it is worth an estimate."""
TIMEOUT_SECONDS = 600.0
"""An estimate that takes longer is given up."""
TOLERANCE = 0.1
"""A larger difference is a warning."""
LOW_PRIORITY = 10

_CHILD = """
import os, sys
from titan_lite.run.signals import die_with_parent
die_with_parent(os.getppid())
from estimation.__main__ import main
sys.exit(main())
"""
"""`python -m estimation`, which ends when the run does."""

_AT_REST = ("parameters", "optimizer state", "memory")
"""Categories of the estimate that are there between steps."""


class EstimateHook(Hook):
    """Measures one step behind the first, has the run estimated beside the training, and tells `sinks` of both.

    For one rank. The estimate is a process of low priority on one CPU core that is started when all is measured, so
    that it disturbs neither; it holds no device. On CUDA the second step is measured, without waiting for it. On a CPU
    the allocator's events of the second step are recorded by torch's profiler, and the time is that of the third.
    """

    def __init__(
        self,
        always: bool,
        sinks: Sequence[Sink],
        device: torch.device,
        records: bool = True,
        command: Sequence[str] = (sys.executable, "-c", _CHILD),
    ) -> None:
        """`records`: whether the profiler is free to record on a CPU. `always`: compare short runs too."""
        self.always, self.sinks, self.device, self.records = always, tuple(sinks), device, records
        self.command = tuple(command)
        self._measured: Cost | None = None
        self._profile: torch.profiler.profile | None = None
        self._live_gib: float | None = None
        self._rest_gib = 0.0
        self._process: subprocess.Popen[str] | None = None

    def on_start(self, facts: RunFacts) -> None:
        self.facts = facts
        self._wanted = True

    def on_step(self, result: StepResult) -> None:
        if not self._wanted:
            return
        if self._process is not None:
            self._poll()
            return
        number = result.step - self.facts.start_step
        if number == 1:
            self._wanted = self._is_worth_it(result)
            if self._wanted:
                self._begin()
        elif number == 2 and self.device.type == "cpu":
            self._stop_recording()
        else:
            self._measure(result)
            self._wanted = self._is_worth_it(result)  # the first step was slower than all others
            if self._wanted:
                self._start()

    def on_end(self, reason: str) -> None:
        if self._profile is not None:
            self._profile.stop()
        if self._process is None:
            return
        if self.always and reason == "completed":
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._deadline - time.monotonic()))
        if self._process.poll() is not None:
            self._tell()
            return
        self._process.kill()
        self._process.communicate()
        logger.info("The run ended before its estimate was there")

    # ---- what is measured

    def _is_worth_it(self, result: StepResult) -> bool:
        to_go = result.step_seconds * (self.facts.steps - result.step)
        return self.always or to_go >= LONG_ENOUGH_SECONDS

    def _begin(self) -> None:
        if self.device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        elif self.records:
            self._record()

    def _record(self) -> None:
        self._rest_gib = self.facts.resting_bytes() / GIB
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def _stop_recording(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._live_gib = self._rest_gib + peak_of_events(self._profile) / GIB
            self._profile = None

    def _measure(self, result: StepResult) -> None:
        reserved = None
        if self.device.type == "cuda":
            self._events[1].record()
            self._rest_gib = self.facts.resting_bytes() / GIB
            self._live_gib = torch.cuda.max_memory_allocated(self.device) / GIB
            reserved = torch.cuda.max_memory_reserved(self.device) / GIB
        self._measured, self._step = Cost(self._live_gib, reserved, result.step_seconds), result.step

    # ---- what is estimated

    def _start(self) -> None:
        facts = self.facts
        arguments = [str(facts.dump_folder / "config.toml"), "--world-size", str(facts.world_size), "--json"]
        arguments += ["--device", "cpu" if self.device.type == "cpu" else facts.device, "--no-advice"]
        arguments += [f"--training.global_batch_size={facts.global_batch_size}"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            self._process = subprocess.Popen([*self.command, *arguments], env=environment, text=True, **pipes)
            if not self.always:  # else the run may come to wait for it
                os.setpriority(os.PRIO_PROCESS, self._process.pid, LOW_PRIORITY)
        except OSError as error:
            logger.warning("The run is not compared with its estimate: %s", error)
            self._wanted = False
        self._deadline = time.monotonic() + TIMEOUT_SECONDS

    def _poll(self) -> None:
        """Tells of the estimate when it is there, or took too long."""
        assert self._process is not None
        if self._process.poll() is not None:
            self._tell()
        elif time.monotonic() >= self._deadline:
            self._process.kill()
            self._tell()

    def _tell(self) -> None:
        assert self._process is not None
        assert self._measured is not None
        out, err = self._process.communicate()
        code = self._process.returncode
        self._process, self._wanted = None, False
        if code != 0:
            why = "it took too long, or was killed" if code < 0 else (err.strip().splitlines() or ["it failed"])[-1]
            logger.warning("The run is not compared with its estimate: %s", why)
            return
        measured = self._measured
        if self.device.type == "cuda":  # the device has long been through with it
            self._events[1].synchronize()
            measured = replace(measured, step_seconds=self._events[0].elapsed_time(self._events[1]) / 1000)
        try:
            comparison = compared(self._step, measured, self._rest_gib, json.loads(out))
        except (ValueError, KeyError) as error:  # nothing that it says may end a run
            logger.warning("The run is not compared with its estimate, which cannot be read: %r", error)
            return
        for sink in self.sinks:
            sink.comparison(comparison)


def peak_of_events(profile: torch.profiler.profile) -> int:
    """The most bytes that were live at once, of those allocated while the profile was taken."""
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compared(step: int, measured: Cost, rest_gib: float, found: Mapping[str, Any]) -> LoggedComparison:
    """A measured step beside an estimate, the JSON object of `python -m estimation`, with what to look at."""
    on_cuda = measured.reserved_gib is not None
    name = "peak_reserved_expandable_gib" if _expandable() else "peak_reserved_gib"
    estimated = Cost(found["peak_live_gib"], found[name] if on_cuda else None, found["step_seconds"])
    doubts = []
    if differs(measured.live_gib, estimated.live_gib):
        doubts.append(_of_memory(rest_gib, found))
    elif differs(measured.reserved_gib, estimated.reserved_gib):
        doubts.append("reserved memory: what is live agrees, so look at how the allocator's segments are filled")
    if on_cuda and differs(measured.step_seconds, estimated.step_seconds):  # a CPU's rates are those of a busy one
        doubts.append(_of_time(found))
    return LoggedComparison(step, measured, estimated, tuple(doubts))


def differs(measured: float | None, estimated: float | None) -> bool:
    """Whether both are known and more than `TOLERANCE` apart."""
    return measured is not None and estimated is not None and abs(measured - estimated) > TOLERANCE * estimated


def _of_memory(rest_gib: float, found: Mapping[str, Any]) -> str:
    """The term of the memory that a difference is likeliest in."""
    categories: dict[str, float] = found["categories"]
    rest = sum(categories.get(name, 0.0) for name in _AT_REST)
    if differs(rest_gib, rest):
        return f"live memory: look at what rests between steps, measured {rest_gib:.3f} GiB, estimated {rest:.3f}"
    moving = {name: gib for name, gib in categories.items() if name not in _AT_REST}
    if not moving:
        return "live memory: what rests between steps agrees, so look at what a step allocates"
    largest = max(moving, key=lambda name: moving[name])
    where = " of ".join(part for part in (found["peak_at"]["phase"], found["peak_at"]["unit"]) if part)
    said = f"live memory: look at {largest}, estimated {moving[largest]:.3f} GiB at the peak in {where}"
    return said + (f"; not modelled: {found['not_modelled'][0]}" if found["peak_is_upper_bound"] else "")


def _of_time(found: Mapping[str, Any]) -> str:
    """The term of the time that a difference is likeliest in."""
    terms = dict(found["seconds_by_kind"])
    terms |= {f"communication over {axis}": entry["seconds"] for axis, entry in found["communication"].items()}
    largest = max(terms, key=lambda name: terms[name])
    return f"step time: look at {largest}, estimated {terms[largest]:.4f} s, and at the assumptions it rests on"


def _expandable() -> bool:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:True" in os.environ.get(name, "") for name in names)
