"""One job in one process and over several ranks: what its first steps compute, to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.runs import CPU, full
from titan_lite.config.load import job_from_dict
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.calibrate import calibrate
from titan_lite.step import MicroBatch, Training, build, step

ROWS, T, VOCAB = 4, 16, 256
RTOL = 1e-5
"""fp32: losses and gradient norms."""
GRADIENT_RTOL = 1e-4
"""fp32: |difference| / |gradient| of each tensor."""
RATE = 0.03
"""Of SGD: at larger ones some models (squared scores, experts) blow rounding up within three steps."""
FLOOR = 1e-6
"""Part of the norm of all gradients below which a tensor's is rounding: that of a key's bias, for instance, is 0."""


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
    size = ROWS // training.world.dp_size
    first = training.world.dp_rank * size
    return MicroBatch(*(part[first : first + size] for part in batch(index)))


def micro_batches(training: Training, index: int) -> list[MicroBatch]:
    """This rank's rows of a global batch, as its model takes them."""
    rows = share(training, index)
    size = getattr(getattr(training.model, "pipeline", None), "rows", len(rows.rows))
    return [MicroBatch(*parts) for parts in zip(*(part.split(size) for part in rows), strict=True)]


class _Batches:
    def __init__(self, training: Training):
        self.training = training

    def __iter__(self) -> Any:
        yield share(self.training, 0)

    def close(self) -> None:
        pass


def built(tables: dict[str, Any]) -> Training:
    """The model in the world of this process, with SGD: Adam makes steps of the rounding of tiny gradients."""
    job = job_from_dict(tables)
    precision = Precision.of(job, CPU)
    world = World.connect(job.parallelism, CPU, dist.is_initialized(), 60, len(precision.masters) > 1)
    training = build(job, world, precision, VOCAB)
    calibrate(training, lambda: _Batches(training), lambda one: [one])
    trained = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    return replace(training, optimizer=torch.optim.SGD(trained))


def steps(tables: dict[str, Any], n: int = 3) -> Steps:
    """The first steps of a job."""
    return run(built(tables), n)


def run(training: Training, n: int) -> Steps:
    training = replace(training, peak_lr=RATE)
    gradients: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        for name, parameter in training.model.named_parameters() if not gradients else ():
            if parameter.grad is not None:
                gradients[name] = full(parameter.grad)

    training.optimizer.register_step_pre_hook(look)
    losses, norms = [], []
    for index in range(n):
        n_tokens = (batch(index).targets != -100).sum().item()
        result = step(training, micro_batches(training, index), n_tokens, index)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    weights = {name: full(p) for name, p in training.model.named_parameters()}
    return Steps(losses, norms, *(of_all_stages(training, tensors) for tensors in (gradients, weights)))


def of_all_stages(training: Training, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks' stages; what several have must be equal to the bit."""
    found: dict[str, Tensor] = {}
    for tensors in training.world.gather(mine) if training.world.pp_size > 1 else [mine]:
        for name, tensor in tensors.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return found


def differences(one: Steps, other: Steps) -> list[str]:
    """Where `other` is not what `one` is, the nearest thing to a cause first."""
    if one.weights.keys() != other.weights.keys():
        return [f"parameters: {sorted(one.weights.keys() ^ other.weights.keys())}"]
    whole = torch.stack([gradient.norm() for gradient in one.gradients.values()]).norm()
    out = [f"gradient of {text}" for text in _far(one.gradients, other.gradients, FLOOR * whole)]
    for what, mine, theirs in (("loss", one.losses, other.losses), ("norm", one.norms, other.norms)):
        pairs = enumerate(zip(mine, theirs, strict=True))
        out += [f"{what} of step {i}: {a} and {b}" for i, (a, b) in pairs if not abs(a - b) <= RTOL * abs(a)]
    return out + [f"weight {text}" for text in _far(one.weights, other.weights, 0.1 * FLOOR * whole)]


def _far(one: Mapping[str, Tensor], other: Mapping[str, Tensor], floor: Any) -> list[str]:
    if one.keys() != other.keys():
        return [f"only one: {sorted(one.keys() ^ other.keys())}"]
    found = []
    for name, mine in one.items():
        distance = (mine.float() - other[name].float()).norm()
        if not distance <= GRADIENT_RTOL * mine.float().norm() + floor:
            found.append(f"{name}: {distance / mine.float().norm():.1e} of it")
    return found
