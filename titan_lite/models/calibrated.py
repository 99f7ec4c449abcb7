"""Modules whose first values depend on the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from titan_lite.models.module import Module

Forward = Callable[[], None]
"""Runs the model over the calibration batches, as in training but without gradients and without a step."""
Total = Callable[..., list[float]]
"""Sums its arguments over the ranks, which see different rows."""


class Calibrated(Module):
    """A module some of whose parameters are set from the first training batches, before the first step of a run.

    Until then, and where nobody calibrates, they are what their specs say.
    """

    calibration_batches: int = 0
    """How many global batches it wants to see; 0 = none."""

    @classmethod
    def calibrate(cls, modules: Mapping[str, Calibrated], forward: Forward, total: Total) -> dict[str, float]:
        """Sets parameters of the model's `modules` (by name) of this class that want to see batches.

        Called alike on every rank, while parameters are sharded; `forward` may be called any number of times. Returns
        {parameter name: what all its elements were set to}.
        """
        raise NotImplementedError


def fill(parameter: nn.Parameter, value: float) -> None:
    """Sets every element of a parameter, plain or sharded, outside of forward and backward."""
    # Half a second to import, and checking a config reads this file too.
    from torch.distributed.tensor import DTensor

    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.detach().fill_(value)
