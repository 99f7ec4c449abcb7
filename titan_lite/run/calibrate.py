"""Before the first step: parameters that start from what the first training batches do in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Protocol

import torch

from titan_lite.checkpoint.world import agreed
from titan_lite.data.batch import Batch
from titan_lite.models.calibrated import Calibrated
from titan_lite.parallel.fsdp import reshard
from titan_lite.run.logging import logger
from titan_lite.step import MicroBatch, Training, mean_loss


class Batches(Protocol):
    """This rank's training batches from the first on."""

    def __iter__(self) -> Iterator[Batch]: ...
    def close(self) -> None: ...


def calibrate(
    training: Training, open_batches: Callable[[], Batches], split: Callable[[Batch], Sequence[MicroBatch]]
) -> None:
    """Lets the modules that want to see data set their parameters; without such modules, nothing is even read.

    `open_batches` starts reading at the run's first batch and is closed again: the run's own reader still begins there.
    """
    kinds: dict[type[Calibrated], dict[str, Calibrated]] = {}
    wanted = 0
    for name, module in training.model.named_modules():
        if isinstance(module, Calibrated) and module.calibration_batches:
            kinds.setdefault(type(module), {})[name] = module
            wanted = max(wanted, module.calibration_batches)
    if not wanted:
        return
    with agreed(training.world), closing(open_batches()) as batches:
        micro_batches = [part for batch in islice(batches, wanted) for part in split(batch)]
    for kind, modules in kinds.items():
        found = kind.calibrate(modules, partial(_forward, training, micro_batches), training.world.total)
        for name, value in found.items():
            logger.info("Calibrated: %s = %.6g", name, value)


@torch.no_grad()
def _forward(training: Training, batches: Iterable[MicroBatch]) -> None:
    """The model over some batches as in step 0, and back to sharded parameters, as only a backward does by itself."""
    # What the modules look at must run: a graph compiled before would not call hooks, one compiled now would keep them.
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            mean_loss(training, batch, n_tokens=1, index=0)
    reshard(training.model)
