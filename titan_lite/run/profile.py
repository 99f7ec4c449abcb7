"""Profiler traces and CUDA memory snapshots of every `profile_freq`-th step."""

from __future__ import annotations

import logging
import pickle
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from titan_lite.config.errors import ConfigError
from titan_lite.run.hooks import Hook, RunFacts, StepResult

if TYPE_CHECKING:
    from titan_lite.run.config import Profiling

_SNAPSHOT_EVENTS = 100_000
"""Allocations and frees a memory snapshot remembers."""

logger = logging.getLogger(__name__)


class ProfilerHook(Hook):
    """Writes `<folder>/iteration_N/rankR_trace.json`, a Chrome trace of the `profiler_active` steps up to step N.

    N is every multiple of `profile_freq`; the `profiler_warmup` steps before are profiled and thrown away.
    """

    def __init__(self, config: Profiling, dump_folder: Path, rank: int, device: torch.device) -> None:
        self.config = config
        self.folder = dump_folder / config.save_traces_folder
        self.rank = rank
        self.device = device

    def on_start(self, facts: RunFacts) -> None:
        from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

        first = (facts.start_step // self.config.profile_freq + 1) * self.config.profile_freq
        if first > facts.steps:
            logger.warning(
                "no profiler trace will be written: the first would be of step %d, the last step is %d",
                first,
                facts.steps,
            )
        self._start_step = facts.start_step
        self._steps_in_trace = 0
        self._recording = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
        wait = self.config.profile_freq - self.config.profiler_warmup - self.config.profiler_active
        rhythm = schedule(wait=wait, warmup=self.config.profiler_warmup, active=self.config.profiler_active)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            # The profiler counts the steps of this process; the rhythm is that of the run, over all its restarts.
            schedule=lambda step: rhythm(facts.start_step + step),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        # Each window is written out before the next one begins, so nothing that torch clears is missed.
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events at the end of each cycle")
        self._profile.start()

    def on_step(self, result: StepResult) -> None:
        self._steps_in_trace += self._profile.current_action in self._recording
        self._profile.step()

    def on_end(self, reason: str) -> None:
        self._profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        if not self._steps_in_trace:  # the run ends where recording has just begun
            return
        self._steps_in_trace = 0
        started = time.perf_counter()
        step = self._start_step + profile.step_num
        path = _iteration_folder(self.folder, f"iteration_{step}") / f"rank{self.rank}_trace.json"
        profile.export_chrome_trace(str(path))
        logger.info("Wrote the profiler trace %s in %.2f seconds", path, time.perf_counter() - started)


class MemorySnapshotHook(Hook):
    """Writes `<folder>/iteration_N/rankR_memory_snapshot.pickle` for pytorch.org/memory_viz, also if the run fails."""

    def __init__(self, config: Profiling, dump_folder: Path, rank: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError.at(
                "profiling.enable_memory_snapshot",
                f"only CUDA's allocator records its history, and this run is on {device.type}",
                value=True,
                allowed="false",
            )
        self.freq = config.profile_freq
        self.folder = dump_folder / config.save_memory_snapshot_folder
        self.rank = rank
        self._step = 0

    def on_start(self, facts: RunFacts) -> None:
        self._step = facts.start_step
        torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_EVENTS)

    def on_step(self, result: StepResult) -> None:
        self._step = result.step
        if result.step % self.freq == 0:
            self._write(f"iteration_{result.step}")

    def on_end(self, reason: str) -> None:
        if reason.startswith("failed"):
            self._write(f"iteration_{self._step}_exit")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str) -> None:
        path = _iteration_folder(self.folder, name) / f"rank{self.rank}_memory_snapshot.pickle"
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        logger.info("Wrote the memory snapshot %s", path)


def _iteration_folder(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    return path
