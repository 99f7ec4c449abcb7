"""Building a model for a world, and one optimizer step. Trainer, estimator, benchmarks and tests all call these two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from titan_lite.models.init import initialize
from titan_lite.models.module import Module
from titan_lite.models.spec import Spec, collect_specs
from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import CrossEntropy
from titan_lite.objectives.lm import LanguageModeling
from titan_lite.optim.groups import parameter_groups
from titan_lite.optim.schedule import LRScheduler
from titan_lite.parallel.apply import parallelize
from titan_lite.parallel.compile import loss_compiler
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World

if TYPE_CHECKING:
    from titan_lite.job import Job


@dataclass(frozen=True)
class Training:
    """A model on its devices with everything that changes it."""

    world: World
    model: Transformer
    specs: dict[str, Spec]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    peak_lr: float
    objective: LanguageModeling
    max_norm: float


class MicroBatch(NamedTuple):
    """Rows of one forward pass, each (B, T)."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor


class StepTensors(NamedTuple):
    """What a step leaves on the device; nothing has waited for it."""

    loss: Tensor
    """Mean over the global batch's targets, nats per token."""
    grad_norm: Tensor
    """Over all parameters, before clipping."""
    lr: float


def build(job: Job, world: World, precision: Precision, vocab_size: int, blank: bool = False) -> Training:
    """The model of `job`, sharded over `world` with its initial weights, and its optimizer.

    `blank` leaves the weights as the memory was: for a checkpoint that will fill all of them.
    """
    with torch.device("meta"):
        model: Transformer = job.model.build(vocab_size=vocab_size).to(precision.master)
    specs = collect_specs(model)
    parallelize(model, job, world, precision)
    if not blank:
        initialize(model, specs, job.model.init.build(n_layers=job.model.n_layers), job.debug.seed)
    optimizer = job.optimizer.build(groups=parameter_groups(model, specs, job.optimizer.weight_decay))
    return Training(
        world=world,
        model=model,
        specs=specs,
        optimizer=optimizer,
        schedule=job.lr_scheduler.build(steps=job.training.steps),
        peak_lr=job.optimizer.lr,
        objective=LanguageModeling(CrossEntropy(job.training.loss_chunk_tokens, loss_compiler(job.compile))),
        max_norm=job.training.max_norm,
    )


def step(training: Training, batches: Sequence[MicroBatch], n_tokens: float, index: int) -> StepTensors:
    """One optimizer step, the `index`-th from 0, on this rank's micro-batches; `n_tokens` counts all ranks' targets."""
    lr = training.peak_lr * training.schedule.factor(index)
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    model = training.model
    losses = (partial(_mean_loss, training, batch, n_tokens) for batch in batches)
    loss = training.world.forward_backward(model, losses, last=len(batches) - 1)
    norm = clip_grad_norm_(model.parameters(), training.max_norm)
    training.optimizer.step()
    training.optimizer.zero_grad()
    for module in model.modules():
        if isinstance(module, Module):
            module.after_step()
    return StepTensors(training.world.total_tensor(loss), norm.full_tensor() if isinstance(norm, DTensor) else norm, lr)


def _mean_loss(training: Training, batch: MicroBatch, n_tokens: float) -> Tensor:
    """This micro-batch's share of the mean over the global batch."""
    device = training.world.device
    tokens, targets, documents = (part.to(device, non_blocking=True) for part in batch)
    return training.objective(training.model, tokens, targets, documents) / n_tokens
