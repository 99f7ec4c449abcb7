"""Builds the hooks a config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from titan_lite.config.machine import is_installed
from titan_lite.run.console import ConsoleSink
from titan_lite.run.estimate import EstimateHook
from titan_lite.run.gc import GarbageCollectionHook
from titan_lite.run.hooks import Hook, HookList
from titan_lite.run.jsonl import JsonLines
from titan_lite.run.metrics import MetricsHook
from titan_lite.run.profile import MemorySnapshotHook, ProfilerHook
from titan_lite.run.sink import Sink
from titan_lite.run.tracking import TensorBoard, WeightsAndBiases

if TYPE_CHECKING:
    from titan_lite.job import Job


def build_hooks(job: Job, rank: int, device: torch.device) -> HookList:
    """Everything a run shows and records, for one rank."""
    folder = Path(job.job.dump_folder)
    sinks = _sinks(job, rank, folder)
    hooks: list[Hook] = []
    if rank == 0 and job.metrics.compare_with_estimate != "never" and is_installed("estimation"):
        always, profiled = job.metrics.compare_with_estimate == "always", job.profiling.enable_profiling
        hooks.append(EstimateHook(always, sinks, device, records=not profiled))
    hooks.append(MetricsHook(job.metrics.log_freq, sinks, device))  # which closes the sinks
    if job.profiling.enable_profiling:
        hooks.append(ProfilerHook(job.profiling, folder, rank, device))
    if job.profiling.enable_memory_snapshot:
        hooks.append(MemorySnapshotHook(job.profiling, folder, rank, device))
    watch_cuda = rank == 0 and device.type == "cuda"
    hooks.append(GarbageCollectionHook(job.training.gc_freq, job.training.gc_debug, watch_cuda))
    return HookList(hooks)


def _sinks(job: Job, rank: int, folder: Path) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl"), ConsoleSink()] if rank == 0 else []
    if rank and not job.metrics.save_for_all_ranks:
        return sinks
    own = f"rank_{rank}" if job.metrics.save_for_all_ranks else ""
    tracking = folder / job.metrics.save_tb_folder / own
    if job.metrics.enable_tensorboard:
        sinks.append(TensorBoard(tracking))
    if job.metrics.enable_wandb:
        sinks.append(WeightsAndBiases(tracking, job.model_dump(mode="json"), own and f"-{own}"))
    return sinks
