"""Admin: post-norm that trains at depth, by a shortcut as strong as what earlier branches have added."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveInt
from titan_lite.models.calibrated import Calibrated, Forward, Total, fill
from titan_lite.models.context import Context
from titan_lite.models.module import OnTokens
from titan_lite.models.norm import Norm
from titan_lite.models.residual.base import Branch, Residual
from titan_lite.models.residual.branch_scale import BranchScale, NoScale, ReZero
from titan_lite.models.spec import Spec

if TYPE_CHECKING:
    from titan_lite.job import Job

TOLERANCE = 1e-6
"""Profiling ends when no omega moves by more than this part of itself."""


class Admin(Residual):
    """x' = norm(omega * x + branch(x)) with a learned omega per channel and branch. Source: arXiv 2004.08249.

    `profile` starts omega_1 at 1 and every later omega^2 at the sum of the variances of the embedding (1 in the paper)
    and of all branches before it, measured on the first training batches. `closed_form` takes all of them to be 1, and
    asks how the output of n = 2 n_layers branches is to change when all of them change a little.
    """

    class Config(Residual.Config):
        type: Literal["admin"] = "admin"
        normalises_stream: ClassVar[bool] = True
        start: Literal["profile", "closed_form"] = "profile"
        """First values of omega: measured on data, or from the number of layers alone."""
        change: Literal["log", "linear", "none"] = "log"
        """Of the closed form: how the output's change grows with depth; omega = sqrt((n + 1) / ln(n + 1) - 1), 1, or
        sqrt(n)."""
        trainable: bool = True
        """Whether omega is trained; if not, it keeps its first values."""
        profile_batches: PositiveInt = 1
        """Global batches to profile on, the first of the training data; they are trained on all the same."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            if not isinstance(self.scale, NoScale.Config | ReZero.Config):  # what is said of ReZero is said above
                yield Problem(
                    code=CROSS_FIELD,
                    key=".scale",
                    value=self.scale.model_dump(),
                    why='does not go with residual.type = "admin", whose omega is for branches as they are',
                    allowed='residual.scale.type = "none"',
                )
            idle = "change" if self.start == "profile" else "profile_batches"
            if getattr(self, idle) != type(self).model_fields[idle].default:
                yield Problem(
                    code=CROSS_FIELD,
                    key=f".{idle}",
                    value=getattr(self, idle),
                    why=f'has no effect with residual.start = "{self.start}"',
                    allowed="leave it out, or another residual.start",
                )

        def first_omega(self, n_layers: int) -> float:
            """What omega is before any data have been seen."""
            n = 2 * n_layers
            if self.start == "profile":
                return 1.0
            return {"log": math.sqrt((n + 1) / math.log(n + 1) - 1), "linear": 1.0, "none": math.sqrt(n)}[self.change]

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.sum = WeightedSum(config, dim, n_layers)
        self.norm = norm.build(dim=dim)

    def forward(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.norm(self.sum(x, self.scaled(branch(x, context), context)))


class WeightedSum(Calibrated, OnTokens):
    """(x, y) -> omega * x + y, (B, T, D) all."""

    def __init__(self, config: Admin.Config, dim: int, n_layers: int):
        super().__init__()
        self.dim, self.start = dim, config.first_omega(n_layers)
        self.calibration_batches = config.profile_batches if config.start == "profile" else 0
        self.omega = nn.Parameter(torch.empty(dim), requires_grad=config.trainable)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.omega * x + y

    def param_specs(self) -> dict[str, Spec]:
        return {"omega": Spec("scalar", 1, self.dim, self.start)}

    @classmethod
    def calibrate(cls, modules: Mapping[str, Calibrated], forward: Forward, total: Total) -> dict[str, float]:
        """Profiles: omega of the i-th branch is r_i, where r_1 = 1 and r_(i+1)^2 = Var(r_i x_i) + Var(f_i(x_i)).

        Variances are of all elements of all rows, in float32. What enters branch i depends on the omegas before it, so
        each pass over the data makes at least one more of them final; in practice all settle within a few passes.
        """
        sums = cast("Mapping[str, WeightedSum]", modules)
        omegas = dict.fromkeys(sums, 1.0)
        for _ in sums:
            before, omegas = omegas, _running(_variances(sums, forward, total))
            for name, omega in omegas.items():
                fill(sums[name].omega, omega)
            if all(abs(omega - before[name]) <= TOLERANCE * omega for name, omega in omegas.items()):
                break
        return {f"{name}.omega": omega for name, omega in omegas.items()}


def _running(variances: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Each branch's omega, given the variances of what entered it and of what it made, in the order they ran."""
    omegas: dict[str, float] = {}
    running = 1.0
    for name, (of_input, of_branch) in variances.items():
        omegas[name] = running
        running = math.sqrt(running**2 * of_input + of_branch)
    return omegas


def _variances(sums: Mapping[str, WeightedSum], forward: Forward, total: Total) -> dict[str, tuple[float, float]]:
    """Variances of the two summands before they are weighted, over all ranks' rows; in the order of the forward."""
    moments: dict[str, list[float]] = {}

    def add(name: str, summands: Sequence[Tensor]) -> None:
        new = [moment for summand in summands for moment in _moments(summand)]
        moments[name] = [a + b for a, b in zip(moments.get(name, [0.0] * len(new)), new, strict=True)]

    hooks = [
        module.register_forward_pre_hook(lambda _, summands, name=name: add(name, summands))
        for name, module in sums.items()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    pooled = {name: total(*values) for name, values in moments.items()}
    return {name: (_variance(*values[:3]), _variance(*values[3:])) for name, values in pooled.items()}


def _moments(x: Tensor) -> tuple[float, float, float]:
    """Number, sum and sum of squares of the elements."""
    variance, mean = (value.item() for value in torch.var_mean(x.float(), correction=0))
    return x.numel(), x.numel() * mean, x.numel() * (variance + mean**2)


def _variance(n: float, total: float, squares: float) -> float:
    return squares / n - (total / n) ** 2
