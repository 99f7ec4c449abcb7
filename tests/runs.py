"""Tiny runs for tests: a config small enough to train in a second, and what its steps computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.config.load import job_from_dict
from titan_lite.job import Job
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.step import MicroBatch, Training, build, step

VOCAB = 64
CPU = torch.device("cpu")


def tiny_job(**sections: dict[str, Any]) -> Job:
    """A float32 job of a two-layer model of width 32: 8 rows of 16 tokens per step. `sections` are merged over it.

    A preset takes the place of that model.
    """
    tables: dict[str, dict[str, Any]] = {
        "model": {"dim": 32, "n_layers": 2},
        "training": {
            "local_batch_size": 8,
            "seq_len": 16,
            "steps": 10,
            "mixed_precision_param": "float32",
            "loss_chunk_tokens": 0,
        },
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": {"warmup_steps": 2},
        "activation_checkpoint": {"mode": "none"},
    }
    for name, section in sections.items():
        tables[name] = tables.get(name, {}) | section
    if "name" in tables["model"]:
        return job_from_dict(tables | {"model": sections["model"]})
    tables["model"].setdefault("attention", {"n_heads": 4, "n_kv_heads": 2})
    tables["model"].setdefault("ffn", {"hidden": 48})
    return job_from_dict(tables)


def global_batch(index: int, rows: int = 8, seq_len: int = 16) -> MicroBatch:
    """Step `index`'s rows, the same for every layout; some targets have no loss, unevenly over the rows."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(VOCAB, (rows, seq_len + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, : row % 5] = -100
    documents = (torch.arange(seq_len) >= seq_len // 2).int().expand(rows, -1)
    return MicroBatch(tokens[:, :-1], targets, documents, torch.arange(rows))


class Run(NamedTuple):
    """What some steps computed, the same on every rank."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build_tiny(sections: dict[str, Any]) -> tuple[Job, Training]:
    """A built model in the world of this process (a pool's rank, or alone)."""
    job = tiny_job(**sections)
    precision = Precision.of(job, CPU)
    second_mesh = len(precision.masters) > 1
    world = World.connect(job.parallelism, CPU, dist.is_initialized(), timeout_seconds=60, second_mesh=second_mesh)
    assert world.mesh is not None or not precision.mixed, "nothing would be cast: only FSDP does, in a process group"
    return job, build(job, world, precision, VOCAB)


def train(sections: dict[str, Any], steps: int) -> Run:
    """Trains on `global_batch`es, each rank on its share of the rows, in micro-batches of training.local_batch_size."""
    job, training = build_tiny(sections)
    world = training.world
    losses, norms = [], []
    for index in range(steps):
        whole = global_batch(index)
        share = len(whole.tokens) // world.dp_size
        mine = [part[world.dp_rank * share : (world.dp_rank + 1) * share] for part in whole]
        size = job.training.local_batch_size
        batches = [MicroBatch(*parts) for parts in zip(*(part.split(size) for part in mine), strict=True)]
        tensors = step(training, batches, (whole.targets != -100).sum().item(), index)
        losses.append(tensors.loss.item())
        norms.append(tensors.grad_norm.item())
    return Run(losses, norms, {name: full(parameter) for name, parameter in training.model.named_parameters()})
