"""Building a model for a world, and one optimizer step. Trainer, estimator, benchmarks and tests all call these two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from titan_lite.models.aux_loss import no_token_weight, token_weight, weighs_tokens
from titan_lite.models.context import Iterations, Memory, TrainingFacts
from titan_lite.models.dropout import Noise, drops, no_noise
from titan_lite.models.ffn.moe import route_evenly
from titan_lite.models.flops import relative_flops
from titan_lite.models.init import initialize
from titan_lite.models.memory import LaneMemory
from titan_lite.models.memory.base import Piece
from titan_lite.models.memory.decoding import Decoding
from titan_lite.models.module import after_step, collect_metrics
from titan_lite.models.spec import Spec, collect_specs
from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import CrossEntropy
from titan_lite.objectives.multi_token import MultiTokenPrediction
from titan_lite.objectives.objective import Counted, Objective, Validation
from titan_lite.optim.groups import parameter_groups
from titan_lite.optim.host import HostStates
from titan_lite.optim.schedule import LRScheduler
from titan_lite.parallel.apply import parallelize
from titan_lite.parallel.compile import loss_compiler
from titan_lite.parallel.float8 import scale_ahead
from titan_lite.parallel.gradients import clip_gradients
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
    objective: Objective
    validation_objective: Validation
    """Pure cross entropy, whatever is minimised."""
    noise: Callable[[int, Tensor], Noise | None]
    """From the step and a micro-batch's rows to what its dropout draws from; None where the model drops nothing."""
    token_weight: Callable[[float], Tensor | None]
    """From the tokens of the global batch to the weight of one; None where no module asks for it."""
    iterations: Callable[[int], Iterations | None]
    """From the step to how often a recurrent stack iterates; None for other stacks."""
    loss_weights: Callable[[Counted, float], tuple[float, ...]]
    """From a step's micro-batches and the global batch's targets to what the objective weighs further losses by."""
    work: Callable[[Iterations | None], float]
    """From a step's iterations to its FLOPs, in units of those expected on average."""
    memory: LaneMemory
    """What rows remember of the steps before."""
    reading: Callable[[Tensor, Tensor, Tensor], Iterator[Piece]]
    """From rows of validation (tokens, targets, documents) to the pieces in which they are read."""
    decoding: Callable[[], Decoding | None]
    """What a text that is sampled remembers; None = all of itself."""
    scale_ahead: Callable[[torch.nn.Module], None]
    """Computes the scales of weights that are gathered in float8; nothing where there are none."""
    max_norm: float


class MicroBatch(NamedTuple):
    """Rows of one forward pass: (B, T) each, but for their numbers."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    rows: Tensor
    """(B,) int64, each row's number in the global batch."""


class StepTensors(NamedTuple):
    """What a step leaves on the device; nothing has waited for it."""

    loss: Tensor
    """What is minimised, without losses that modules add: mean over the global batch's targets, nats per token."""
    grad_norm: Tensor
    """Over all parameters, before clipping."""
    lr: float
    work: float
    """FLOPs per token, in units of what `training_flops_per_token` expects on average."""


def build(job: Job, world: World, precision: Precision, vocab_size: int, blank: bool = False) -> Training:
    """The model of `job`, sharded over `world` with its initial weights, and its optimizer.

    `blank` leaves the weights as the memory was: for a checkpoint that will fill all of them.
    """
    with torch.device("meta"):
        model: Transformer = job.model.build(vocab_size=vocab_size)
    specs = collect_specs(model)
    job.objective.freeze(model)
    if job.debug.moe_force_load_balance:
        route_evenly(model)
    precision.store(model, specs)
    parallelize(model, job, world, precision)
    if not blank:
        initialize(model, specs, job.model.init.build(dim=job.model.dim, n_layers=job.model.depth()), job.debug.seed)
        model.embedding.warm_start()
        after_step(model, world.total_of_layers)
    optimizer = job.optimizer.build(groups=parameter_groups(model, specs, job.optimizer.weight_decay))
    if job.training.enable_optimizer_offload:
        optimizer = HostStates(optimizer)
    memory = lane_memory(job, model, world.device, precision.param)
    cross_entropy = partial(
        CrossEntropy,
        job.training.loss_chunk_tokens,
        loss_compiler(job.compile),
        ranks=model.ranks,
        gather=job.parallelism.disable_loss_parallel,
    )
    n_keys = job.model.memory.keys(job.training.seq_len)
    objective = objective_of(job, model, cross_entropy(z_loss=job.training.z_loss))
    return Training(
        world=world,
        model=model,
        specs=specs,
        optimizer=optimizer,
        schedule=job.lr_scheduler.build(steps=job.training.steps),
        peak_lr=job.optimizer.lr,
        objective=objective,
        validation_objective=objective.validation(cross_entropy()),
        noise=partial(Noise.of, job.debug.seed, world.device) if drops(model) else no_noise,
        token_weight=partial(token_weight, world.device) if weighs_tokens(model) else no_token_weight,
        iterations=partial(model.stack.iterations, job.debug.seed),
        loss_weights=partial(objective.loss_weights, world.total),
        work=cache(partial(relative_flops, model, specs, n_keys, job.objective.logits_per_token)),
        memory=memory,
        reading=partial(memory.reading, seq_len=job.training.seq_len),
        decoding=partial(memory.decoding, job.training.seq_len),
        scale_ahead=scale_ahead(job, world),
        max_norm=job.training.max_norm,
    )


def objective_of(job: Job, model: Transformer, cross_entropy: CrossEntropy) -> Objective:
    """What the job minimises."""
    if weights := job.model.mtp.weights():
        return MultiTokenPrediction(job.objective, cross_entropy, model.row, weights)
    objective: Objective = job.objective.build(cross_entropy=cross_entropy, row=model.row)
    return objective


def lane_memory(job: Job, model: Transformer, device: torch.device, dtype: torch.dtype) -> LaneMemory:
    """The empty memory of a job's model whose activations are of `dtype`."""
    memory: LaneMemory = job.model.memory.build(
        layers=job.model.each_layer(),
        dim=job.model.dim,
        device=device,
        dtype=dtype,
        ranks=model.ranks,
        summaries=model.summaries,
    )
    return memory


def step(training: Training, batches: Sequence[MicroBatch], n_tokens: float, index: int) -> StepTensors:
    """One optimizer step, the `index`-th from 0, on this rank's micro-batches; `n_tokens` counts all ranks' targets."""
    lr = training.peak_lr * training.schedule.factor(index)
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    model = training.model
    weights = training.loss_weights(((batch.targets, batch.documents) for batch in batches), n_tokens)
    n_inputs = training.world.dp_size * sum(batch.tokens.numel() for batch in batches)
    losses = (partial(remembered_loss, training, batch, n_tokens, index, weights, n_inputs) for batch in batches)
    loss = training.world.forward_backward(model, losses, last=len(batches) - 1)
    norm = clip_gradients(list(model.parameters()), training.max_norm, training.world.stages, model.copies())
    training.optimizer.step()
    training.optimizer.zero_grad()
    after_step(model, training.world.total_of_layers)
    training.scale_ahead(model)
    return StepTensors(training.world.total_tensor(loss), norm, lr, training.work(training.iterations(index)))


def metrics(training: Training) -> dict[str, Tensor]:
    """{full name: number} of what the model's modules have to say about the last step. Collective."""
    return training.world.merged(collect_metrics(training.model, training.world.total_of_layers))


def remembered_loss(
    training: Training,
    batch: MicroBatch,
    n_tokens: float,
    index: int,
    weights: tuple[float, ...],
    n_inputs: float,
    model: Transformer,
) -> Tensor:
    """`mean_loss` of rows that go on where those of the step before ended; they remember this step for the next.

    `model` is the training's, or a pipeline stage of it, whose part of the loss this is.
    """
    memory = training.memory.of(batch.rows)
    loss = mean_loss(replace(training, model=model), batch, n_tokens, index, memory, weights, n_inputs)
    if memory is not None:
        memory.advance(batch.documents.to(training.world.device, non_blocking=True))
    return loss


def mean_loss(
    training: Training,
    batch: MicroBatch,
    n_tokens: float,
    index: int,
    memory: Memory | None = None,
    loss_weights: tuple[float, ...] = (),
    n_inputs: float | None = None,
) -> Tensor:
    """This micro-batch's share of the mean over the global batch of step `index`.

    `n_inputs`: all tokens that the model reads in it, where they are not as many as its targets.
    """
    device = training.world.device
    tokens, targets, documents = (part.to(device, non_blocking=True) for part in batch[:3])
    noise, token_weight = training.noise(index, batch.rows), training.token_weight(n_inputs or n_tokens)
    facts = TrainingFacts(noise, token_weight, training.iterations(index), loss_weights)
    return training.objective(training.model, tokens, targets, documents, facts, memory) / n_tokens
