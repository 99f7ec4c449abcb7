"""How many iterations a training step runs."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy
import torch
import xxhash
from torch import Tensor

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.context import Iterations
from titan_lite.models.stack.base import Executions

NODES = 64
"""Of the quadrature over the normal in `LogNormalPoisson.expected`: exact to 1e-9 for any sigma up to 1."""


class IterationSampling(Component):
    """r, of which the last min(r, backprop) iterations are backpropagated through. Built as `build(mean=, backprop=)`.

    A step's r is the same for all its micro-batches and ranks: those that share a model run the same collectives.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "sampling"
        default_type: ClassVar[str | None] = "lognormal_poisson"
        varies: ClassVar[bool] = True
        """Whether steps differ."""

    def __init__(self, config: Config, mean: int, backprop: int):
        self.mean, self.backprop = mean, backprop

    def draw(self, seed: int, step: int) -> Iterations:
        """The iterations of a step: a function of (seed, step)."""
        key = xxhash.xxh64_intdigest(f"iterations/{seed}/{step}".encode()) >> 1
        r = int(self.numbers(1, torch.Generator().manual_seed(key)))
        return Iterations(max(r - self.backprop, 0), min(r, self.backprop))

    def numbers(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` draws of r, float64."""
        raise NotImplementedError

    def expected(self) -> Executions:
        """The mean of r, and of min(r, backprop)."""
        raise NotImplementedError


class Fixed(IterationSampling):
    """r = mean_iterations in every step. Source: arXiv 2502.05171, section 3.3."""

    class Config(IterationSampling.Config):
        type: Literal["fixed"] = "fixed"
        varies: ClassVar[bool] = False

    def numbers(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n,), self.mean, dtype=torch.float64)

    def expected(self) -> Executions:
        return Executions(self.mean, min(self.mean, self.backprop))


class LogNormalPoisson(IterationSampling):
    """r = 1 + Poisson(exp(t)), t from N(ln(mean_iterations) - sigma^2 / 2, sigma^2): mean_iterations + 1 on average.

    Source: arXiv 2502.05171, section 3.3.
    """

    class Config(IterationSampling.Config):
        type: Literal["lognormal_poisson"] = "lognormal_poisson"
        sigma: PositiveFloat = 0.5
        """Standard deviation of t."""

    def __init__(self, config: Config, mean: int, backprop: int):
        super().__init__(config, mean, backprop)
        self.sigma = config.sigma

    def rate(self, z: Tensor) -> Tensor:
        """exp(t), given standard normal z."""
        return torch.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * z)

    def numbers(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        return torch.poisson(self.rate(z), generator=generator) + 1

    def expected(self) -> Executions:
        # E min(r, k) = sum over j < k of P(Poisson >= j), where P(Poisson(a) >= j) = gammainc(j, a).
        nodes, weights = map(torch.from_numpy, numpy.polynomial.hermite_e.hermegauss(NODES))
        rates = self.rate(nodes)
        reached = 1 + sum(torch.special.gammainc(torch.tensor(float(j)), rates) for j in range(1, self.backprop))
        return Executions(self.mean + 1, float((weights * reached).sum() / weights.sum()))
