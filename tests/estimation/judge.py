"""The peak memory of a real step by the profiler's record of what the allocator does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.config.load import job_from_dict
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.step import MicroBatch, build, step

VOCAB = 512
CPU = torch.device("cpu")


def measured_peak(tables: Mapping[str, Any], size: int) -> int:
    """Bytes, on this rank of `size`, in a step behind the first.

    The least of some steps: a thread of gloo holds the buffers of its last collective until it gets another one, which
    the other thread may get.
    """
    job = job_from_dict(tables, size, files=False)
    precision = Precision.of(job, CPU)
    sharded = size > 1 or precision.mixed
    world = World.connect(job.parallelism, CPU, sharded, 60) if sharded else World(0, 1, CPU)
    training = build(job, world, precision, VOCAB)
    local, rows = job.training.local_batch_size, job.training.global_batch_size
    n = 1 if rows == -1 else rows // world.dp_size // local
    tokens = torch.randint(VOCAB, (local, job.training.seq_len))
    documents = torch.zeros_like(tokens)
    batches = [MicroBatch(tokens, tokens, documents, torch.arange(local) + i * local) for i in range(n)]
    n_tokens = float(tokens.numel() * n * world.dp_size)
    step(training, batches, n_tokens, 0)
    states = [t for state in training.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    memory = [t for slot in getattr(training.memory, "slots", {}).values() for t in slot.tensors().values()]
    at_rest = sum(local_bytes(t) for t in (*training.model.parameters(), *states, *memory))
    peak = min(_peak(lambda i=i: step(training, batches, n_tokens, i)) for i in range(1, 7))
    world.close()
    return at_rest + peak


def _peak(run: Callable[[], object]) -> int:
    """Bytes above those at the start."""
    live = peak = 0
    for nbytes in _events(run):
        live += nbytes
        peak = max(peak, live)
    return peak


def net_bytes(run: Callable[[], object]) -> int:
    """Bytes that are there afterwards and were not before."""
    return sum(_events(run))


def _events(run: Callable[[], object]) -> list[int]:
    """What the allocator gives out, and takes back as negative numbers, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return [event.nbytes() for event in events]


def local_bytes(tensor: Tensor) -> int:
    """Of this rank's part."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.numel() * part.element_size()
