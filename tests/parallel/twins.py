"""One job in one process and over several ranks: what its first steps compute, to be compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.pool import WorkerPool
from tests.runs import CPU, full
from titan_lite.config.load import job_from_dict
from titan_lite.generation import Sampling, generate
from titan_lite.optim.host import HostStates
from titan_lite.parallel.fsdp import evaluating
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.calibrate import calibrate
from titan_lite.step import MicroBatch, StepTensors, Training, build, step

ROWS, T, VOCAB = 8, 16, 256
RTOL = 1e-5
"""fp32: losses and gradient norms; logits of about one unit."""
CONTINUED_RTOL = 1e-6
"""fp32: the validation loss."""
GRADIENT_RTOL = 1e-4
"""fp32: |difference| / |gradient| of each tensor, and the same of weights."""
RATE, MOMENTUM = 0.02, 0.5
"""Of SGD: at larger rates some models (squared scores, experts) blow rounding up within three steps."""
SMALL = 1e-2
"""A gradient counts as no smaller than this part of the norm of all: that of a key's bias, for instance, is 0 but for
rounding. A weight counts as no smaller than what such a gradient changes."""


class Steps(NamedTuple):
    """What some steps computed, the same on every rank."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, clipped."""
    weights: dict[str, Tensor]
    """After the last one."""


def batch(index: int) -> MicroBatch:
    """A global batch; some targets have no loss, unevenly over the rows."""
    tokens = torch.randint(VOCAB, (ROWS, T + 1), generator=torch.Generator().manual_seed(index))
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : 2 * row] = -100
    documents = (torch.arange(T) >= 9).int().expand(ROWS, -1)
    return MicroBatch(tokens[:, :-1], targets, documents, torch.arange(ROWS))


def share(training: Training, index: int) -> MicroBatch:
    """This rank's rows of a global batch."""
    own = rows_of(training)
    return MicroBatch(*(part[own.start : own.stop] for part in batch(index)))


def rows_of(training: Training) -> range:
    """Their numbers."""
    size = ROWS // training.world.dp_size
    return range(training.world.dp_rank * size, (training.world.dp_rank + 1) * size)


def micro_batches(training: Training, index: int, size: int = ROWS) -> list[MicroBatch]:
    """This rank's rows of a global batch, `size` at a time, or as many as a pipeline takes."""
    return split(share(training, index), getattr(getattr(training.model, "pipeline", None), "rows", size))


def split(rows: MicroBatch, size: int) -> list[MicroBatch]:
    """`size` of them at a time."""
    return [MicroBatch(*parts) for parts in zip(*(part.split(size) for part in rows), strict=True)]


def continuation(tables: dict[str, Any], n: int) -> tuple[float, list[int], Tensor]:
    """What is not training: the validation loss of some rows, sampled tokens, and the logits of a text of odd length,
    which of a pipeline the last stage has.
    """
    training = built(tables)
    rows, model = share(training, 0), training.model
    with evaluating(model):
        loss = training.validation_objective(model, rows.tokens, rows.targets, rows.documents)
        agree = training.world.broadcast
        tokens = list(generate(model, [1, 2, 3], n, Sampling(), 0, CPU, VOCAB, agree=agree))
        logits = model(torch.tensor([[1, 2, 3, 4, 5]]))
    return training.world.total_tensor(loss).item(), tokens, logits


def assert_continues_alike(one: dict[str, Any], several: dict[str, Any], pool: WorkerPool, n: int = 5) -> None:
    """Validation and sampling of a job in one process and over the ranks of a pool."""
    loss, tokens, logits = continuation(one, n)
    found = pool.run(continuation, several, n, timeout=200)
    for other in found:
        assert other[0] == pytest.approx(loss, rel=CONTINUED_RTOL)
        assert other[1] == tokens
        if other[2].any():  # of a pipeline only the last stage has them
            torch.testing.assert_close(other[2], logits, rtol=RTOL, atol=RTOL)
    assert any(other[2].any() for other in found)


class Case(NamedTuple):
    """A job to compare: over how many ranks, how they share it, what both runs have, what only the parallel one has."""

    ranks: int
    parallelism: dict[str, Any]
    both: dict[str, Any]
    more: dict[str, Any]

    @property
    def sections(self) -> dict[str, Any]:
        """Of the parallel run."""
        return {key: self.both.get(key, {}) | self.more.get(key, {}) for key in self.both | self.more}


def assert_equals_one_process(case: Case, one: dict[str, Any], several: dict[str, Any], *pools: WorkerPool) -> None:
    """The first steps of a case's job in one process and over that one of the pools that has its ranks."""
    (pool,) = (pool for pool in pools if pool.n == case.ranks)
    expected = steps(one)
    for found in pool.run(steps, several, timeout=200):
        assert not differences(expected, found)


class _Batches:
    def __init__(self, training: Training):
        self.training = training

    def __iter__(self) -> Any:
        yield share(self.training, 0)

    def close(self) -> None:
        pass


def built(tables: dict[str, Any]) -> Training:
    """The model in the world of this process, with SGD: Adam makes steps of the rounding of tiny gradients.

    One process has a group of its own where parameters are cast for the forward, which FSDP does: to be closed.
    """
    job = job_from_dict(tables)
    precision = Precision.of(job, CPU)
    sharded = dist.is_initialized() or precision.mixed
    world = World.connect(job.parallelism, CPU, sharded, 60, len(precision.masters) > 1)
    training = build(job, world, precision, VOCAB)
    calibrate(training, lambda: _Batches(training), lambda rows: split(rows, job.training.local_batch_size))
    trained = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, momentum=MOMENTUM)
    if job.training.enable_optimizer_offload:
        optimizer = HostStates(optimizer)
    return replace(training, optimizer=optimizer, peak_lr=RATE)


def steps(tables: dict[str, Any], n: int = 3) -> Steps:
    """The first steps of a job, in micro-batches of training.local_batch_size."""
    training = built(tables)
    try:
        return run(training, n, tables["training"]["local_batch_size"])
    finally:
        training.world.close()


def run(training: Training, n: int, size: int = ROWS) -> Steps:
    """The first n steps, in micro-batches of `size` rows."""
    gradients: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        for name, parameter in training.model.named_parameters() if not gradients else ():
            if parameter.grad is not None:
                gradients[name] = full(parameter.grad)

    getattr(training.optimizer, "inner", training.optimizer).register_step_pre_hook(look)
    results = [one_step(training, index, size) for index in range(n)]
    losses, norms = [result.loss.item() for result in results], [result.grad_norm.item() for result in results]
    weights = {name: full(p) for name, p in training.model.named_parameters()}
    return Steps(losses, norms, *(of_all_stages(training, tensors) for tensors in (gradients, weights)))


def of_all_stages(training: Training, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks' stages; what several have must be equal to the bit."""
    found: dict[str, Tensor] = {}
    for tensors in training.world.gather(mine) if training.world.pp_size > 1 else [mine]:
        for name, tensor in tensors.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return found


def one_step(training: Training, index: int, size: int) -> StepTensors:
    """Step `index`."""
    n_tokens = (batch(index).targets != -100).sum().item()
    return step(training, micro_batches(training, index, size), n_tokens, index)


class Tolerance(NamedTuple):
    """How far two runs of a job may be apart, relative to what is compared."""

    loss: float
    norm: float
    gradient: float
    """Of each tensor, in the first step."""
    weight: float
    """Of each tensor, after the last one."""


EXACT = Tolerance(RTOL, RTOL, GRADIENT_RTOL, GRADIENT_RTOL)
"""fp32, where every sum is the same but for its order."""


def deviations(one: Steps, other: Steps) -> dict[str, dict[str, float]]:
    """{field of a tolerance: {what: how far `other` is from `one`, relative to it}}; inf where one lacks it."""
    whole = torch.stack([gradient.norm() for gradient in one.gradients.values()]).norm()
    return {
        "gradient": _apart(one.gradients, other.gradients, SMALL * whole),
        "loss": _scalars_apart(one.losses, other.losses),
        "norm": _scalars_apart(one.norms, other.norms),
        "weight": _apart(one.weights, other.weights, RATE * SMALL * whole),
    }


def differences(one: Steps, other: Steps, tolerance: Tolerance = EXACT) -> list[str]:
    """Where `other` is not what `one` is, the nearest thing to a cause first."""
    return [
        f"{kind} of {what}: {deviation:.1e}"
        for kind, found in deviations(one, other).items()
        for what, deviation in found.items()
        if not deviation <= getattr(tolerance, kind)
    ]


def _scalars_apart(one: list[float], other: list[float]) -> dict[str, float]:
    pairs = itertools.zip_longest(one, other, fillvalue=math.nan)
    return {f"step {i}": abs(a - b) / abs(a) for i, (a, b) in enumerate(pairs)}


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor], small: Tensor) -> dict[str, float]:
    found = dict.fromkeys(sorted(one.keys() ^ other.keys()), math.inf)
    for name in one.keys() & other.keys():
        distance = (one[name].float() - other[name].float()).norm()
        found[name] = (distance / (one[name].float().norm() + small)).item()
    return found
