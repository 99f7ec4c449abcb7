"""Inits whose standard deviation is the same for every matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from titan_lite.config.fields import PositiveFloat
from titan_lite.models.init.base import Distribution
from titan_lite.models.spec import Spec


def truncated_normal_(block: Tensor, std: float, cutoff: float, generator: torch.Generator) -> None:
    """N(0, std^2) cut at `cutoff` standard deviations: at 3, what is left has 0.9866 of the standard deviation."""
    nn.init.trunc_normal_(block, std=std, a=-cutoff * std, b=cutoff * std, generator=generator)


class FixedStd(Distribution):
    """One standard deviation, divided by sqrt(2 L) for matrices that write into the residual stream."""

    class Config(Distribution.Config):
        std: PositiveFloat = 0.02
        """Standard deviation of every matrix and of the embedding."""
        depth_scaled: bool = True
        """Divide the std of residual matrices by sqrt(2 n_layers)."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.base, self.depth_scaled = config.std, config.depth_scaled

    def std(self, spec: Spec) -> float:
        """The standard deviation of this parameter."""
        return self.base * (self.depth_factor(spec) if self.depth_scaled else 1.0)


class TruncatedNormal(FixedStd):
    """N(0, std^2) cut at `cutoff` standard deviations; those that write into the residual stream use std / sqrt(2 L).

    Source: depth scaling from GPT-2 (Radford et al., 2019, section 2.3).
    """

    class Config(FixedStd.Config):
        type: Literal["truncated_normal"] = "truncated_normal"
        cutoff: PositiveFloat = 3.0
        """In standard deviations."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.cutoff = config.cutoff

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        truncated_normal_(block, self.std(spec), self.cutoff, generator)


class Normal(FixedStd):
    """N(0, std^2); those that write into the residual stream use std / sqrt(2 L).

    Source: GPT-2 (Radford et al., 2019, section 2.3).
    """

    class Config(FixedStd.Config):
        type: Literal["normal"] = "normal"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        block.normal_(std=self.std(spec), generator=generator)


class Like(Distribution):
    """N(0, 2 / (5 D)) with the model's width D, embedding included; residual matrices / sqrt(2 L).

    The init of recurrent-depth models, whose embedding is scaled by sqrt(D). Source: arXiv 2502.05171, after
    arXiv 2312.16903.
    """

    class Config(Distribution.Config):
        type: Literal["like"] = "like"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        std = (2 / (5 * self.dim)) ** 0.5 * self.depth_factor(spec)
        block.normal_(std=std, generator=generator)


class Zeros(Distribution):
    """0: for rules, where query, output or residual matrices begin as nothing.

    Source: arXiv 2203.03466, appendix D.2.
    """

    class Config(Distribution.Config):
        type: Literal["zeros"] = "zeros"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        block.zero_()
