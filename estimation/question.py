"""One job asked about many times, each time with a few keys changed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from estimation.compute import Assumptions
from estimation.devices import GIB, Device
from estimation.estimate import Estimate, estimate
from titan_lite.config.aliases import renamed
from titan_lite.config.load import load_job
from titan_lite.config.merge import merged
from titan_lite.config.overrides import command_line_layer
from titan_lite.config.paths import key_text
from titan_lite.config.reader import read_chain
from titan_lite.config.toml import value_text
from titan_lite.job import Job

if TYPE_CHECKING:
    from typing import TypeAlias

Changes: TypeAlias = Mapping[str, Any]
"""Full key -> the value it is to have."""

T = TypeVar("T")
R = TypeVar("R")

TENSOR, CONTEXT = "parallelism.tensor_parallel_degree", "parallelism.context_parallel_degree"
PIPELINE, EXPERT = "parallelism.pipeline_parallel_degree", "parallelism.expert_parallel_degree"
AXES = {TENSOR: "TP", CONTEXT: "CP", PIPELINE: "PP", EXPERT: "EP"}
"""What the field calls a degree."""

MOST_PROCESSES = 8
"""Each holds torch and a model's trace: about half a GiB."""


@dataclass(frozen=True)
class Outcome:
    """What a job with some changes would cost on each device."""

    changes: Changes
    layout: str
    """As the field calls it."""
    checkpoint: str
    """What backward recomputes."""
    local_batch: int
    """Sequences of a micro-batch."""
    live_gib: float
    reserved_gib: float
    limit_gib: float
    """What the device has for the allocator."""
    spare_gib: float
    """Negative where it does not fit."""
    fits: bool | None
    """None where only an upper bound of its memory is known, and that does not fit."""
    step_seconds: float
    seconds_per_token: float
    """Of all devices together."""
    tokens_per_second_per_device: float
    mfu: float
    sequences: int
    """In a step, over all devices."""
    rest_gib: tuple[float, float]
    """What parameters and what the states of the optimizer hold between steps."""
    computing: float
    """Share of the step in which devices compute; 0 where pipeline ranks compute differently long."""
    exposed: float
    """Share in which they wait for bytes of ranks that share their tokens; 0 of a pipeline, as above."""

    @classmethod
    def of(cls, changes: Changes, job: Job, found: Estimate) -> Outcome:
        """The numbers of an estimate that comparisons need."""
        live = found.memory.peak.live
        return cls(
            changes=changes,
            layout=layout_words(job, found.world_size),
            checkpoint=checkpoint_words(job),
            local_batch=job.training.local_batch_size,
            live_gib=found.memory.peak.total / GIB,
            reserved_gib=found.reserved / GIB,
            limit_gib=found.device.memory_gib - found.outside_gib,
            spare_gib=found.spare_gib,
            fits=found.fits,
            step_seconds=found.compute.seconds,
            seconds_per_token=1 / (found.tokens_per_second_per_device * found.world_size),
            tokens_per_second_per_device=found.tokens_per_second_per_device,
            mfu=found.mfu,
            sequences=sequences(job, found.world_size),
            rest_gib=(live.get("parameters", 0) / GIB, live.get("optimizer state", 0) / GIB),
            computing=0.0 if found.pipeline else found.compute.computing / found.compute.seconds,
            exposed=0.0 if found.pipeline else found.compute.exposed / found.compute.seconds,
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "changes": dict(self.changes),
            "layout": self.layout,
            "activation_checkpoint": self.checkpoint,
            "local_batch_size": self.local_batch,
            "fits": self.fits,
            "peak_live_gib": self.live_gib,
            "peak_reserved_gib": self.reserved_gib,
            "spare_gib": self.spare_gib,
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_device": self.tokens_per_second_per_device,
            "mfu": self.mfu,
            "sequences_per_step": self.sequences,
        }


@dataclass(frozen=True)
class Question:
    """A TOML file with overrides, as many devices of a kind."""

    path: str
    overrides: tuple[str, ...]
    world_size: int
    device: Device
    assumed: Assumptions

    def given(self) -> Job:
        """The job as it is, for any number of devices; ConfigError where training would refuse it."""
        return load_job(self.path, self.overrides, files=False)

    def job(self, changes: Changes) -> Job:
        """The job with the changes; ConfigError where training would refuse it."""
        return load_job(self.path, (*self.overrides, *_as_overrides(changes)), self.world_size, files=False)

    def answer(self, changes: Changes) -> Outcome:
        """What it would cost."""
        job = self.job(changes)
        return Outcome.of(changes, job, estimate(job, self.world_size, self.device, self.assumed))

    def tables(self, changes: Changes) -> dict[str, Any]:
        """The overrides and the changes as tables of a TOML file."""
        below = merged(read_chain(self.path), Job).tables
        layer, problems = command_line_layer((*self.overrides, *_as_overrides(changes)), Job, below)
        assert not problems, "the job was loaded with them"
        return layer.tables


def layout_words(job: Job, world_size: int) -> str:
    """A layout as the field calls it, such as "HSDP 2 x 4, TP 2"."""
    layout = job.parallelism
    replicate, degree = layout.data_parallel_replicate_degree, layout.data_parallel_degree(world_size)
    assert degree is not None, "the config check lets no other degrees through"
    shard = degree // replicate
    data = f"FSDP {shard}" if replicate == 1 else f"DDP {replicate}" if shard == 1 else f"HSDP {replicate} x {shard}"
    words = [data] if degree > 1 else []
    words += [f"{word} {value_at(job, key)}" for key, word in AXES.items() if value_at(job, key) > 1]
    return ", ".join(words) or "one device"


def checkpoint_words(job: Job) -> str:
    """What is recomputed: "none", "each 2." (block), "per op", "full" or "memory budget 0.5"."""
    config = job.activation_checkpoint
    if config.mode == "selective":
        return "per op" if config.selective_ac_option == "op" else f"each {config.selective_ac_option}."
    return f"memory budget {config.memory_budget:g}" if config.mode == "memory_budget" else config.mode


def sequences(job: Job, world_size: int) -> int:
    """Sequences of a job's step, over all ranks."""
    given = job.training.global_batch_size
    degree = job.parallelism.data_parallel_degree(world_size)
    assert degree is not None, "the config check lets no other degrees through"
    return job.training.local_batch_size * degree if given == -1 else given


def value_at(job: Job, key: str) -> Any:
    """What a job has at a full key."""
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name)
    return value


def keys_of(overrides: Sequence[str]) -> frozenset[str]:
    """The keys that a command line sets, by their names of today."""
    names = [argument.partition("=")[0] for argument in overrides if argument.startswith("--")]
    return frozenset(key_text(renamed(tuple(name[2:].split(".")))) for name in names)


@contextmanager
def workers(processes: int | None, most: int) -> Iterator[Callable[[Callable[[T], R], Sequence[T]], Iterator[R]]]:
    """Like `map`, in so many processes; in this one where there is but one to start. `most` = items at a time.

    None = as many as this process has CPUs, up to `MOST_PROCESSES`.
    """
    processes = min(processes or _cpus(), most)
    if processes <= 1:
        yield map
        return
    # A server that has imported what it takes forks all others: this process may have threads, which a fork forgets.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["estimation.plan"])
    with ProcessPoolExecutor(processes, context) as pool:
        yield pool.map


def _cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_PROCESSES)


def _as_overrides(changes: Changes) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else value_text(value)}" for key, value in changes.items()]
