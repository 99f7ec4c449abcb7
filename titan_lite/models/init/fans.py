"""Inits whose standard deviation depends on a matrix's inputs and outputs.

An embedding's row is looked up, not summed: its fan-in is 1 and its fan-out the row's width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from titan_lite.config.fields import PositiveFloat
from titan_lite.models.init.base import Distribution
from titan_lite.models.init.normal import truncated_normal_
from titan_lite.models.spec import Spec


def uniform_(block: Tensor, std: float, generator: torch.Generator) -> None:
    """Uniform on [-sqrt(3) std, sqrt(3) std)."""
    bound = 3**0.5 * std
    block.uniform_(-bound, bound, generator=generator)


class FanIn(Distribution):
    """std = gain * fan_in^-power; residual matrices / sqrt(2 L). An embedding, of fan-in 1, has std = gain.

    With power 0.5 a matrix keeps the scale of its input; power 1 is for muP's output matrix.
    Source: arXiv 2203.03466, appendix B.1.
    """

    class Config(Distribution.Config):
        type: Literal["fan_in"] = "fan_in"
        gain: PositiveFloat = 1.0
        """Factor of the standard deviation."""
        power: PositiveFloat = 0.5
        """Exponent of 1 / fan_in."""
        distribution: Literal["normal", "truncated"] = "normal"
        """Normal, or normal cut at 3 standard deviations."""
        depth_scaled: bool = True
        """Divide the std of residual matrices by sqrt(2 n_layers)."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.config = config

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        config = self.config
        std = config.gain * spec.fan_in**-config.power * (self.depth_factor(spec) if config.depth_scaled else 1.0)
        if config.distribution == "normal":
            block.normal_(std=std, generator=generator)
        else:
            truncated_normal_(block, std, 3.0, generator)


class Xavier(Distribution):
    """std = gain * sqrt(2 / (fan_in + fan_out)): between keeping the scale of activations and that of gradients."""

    class Config(Distribution.Config):
        gain: PositiveFloat = 1.0
        """Factor of the standard deviation."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.gain = config.gain

    def std(self, spec: Spec) -> float:
        """The standard deviation of this parameter."""
        return self.gain * (2 / (spec.fan_in + spec.fan_out)) ** 0.5


class XavierUniform(Xavier):
    """Uniform with std = gain * sqrt(2 / (fan_in + fan_out)). Source: Glorot and Bengio, 2010 (AISTATS)."""

    class Config(Xavier.Config):
        type: Literal["xavier_uniform"] = "xavier_uniform"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        uniform_(block, self.std(spec), generator)


class XavierNormal(Xavier):
    """Normal with std = gain * sqrt(2 / (fan_in + fan_out)). Source: Glorot and Bengio, 2010 (AISTATS)."""

    class Config(Xavier.Config):
        type: Literal["xavier_normal"] = "xavier_normal"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        block.normal_(std=self.std(spec), generator=generator)


class Kaiming(Distribution):
    """std = gain / sqrt(fan_in)."""

    class Config(Distribution.Config):
        gain: PositiveFloat = 2**0.5
        """Factor of the standard deviation; sqrt(2) suits ReLU. 1 / sqrt(3), uniform, is torch's for linear layers."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.gain = config.gain

    def std(self, spec: Spec) -> float:
        """The standard deviation of this parameter."""
        return self.gain * spec.fan_in**-0.5


class KaimingUniform(Kaiming):
    """Uniform with std = gain / sqrt(fan_in). Source: arXiv 1502.01852."""

    class Config(Kaiming.Config):
        type: Literal["kaiming_uniform"] = "kaiming_uniform"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        uniform_(block, self.std(spec), generator)


class KaimingNormal(Kaiming):
    """Normal with std = gain / sqrt(fan_in). Source: arXiv 1502.01852."""

    class Config(Kaiming.Config):
        type: Literal["kaiming_normal"] = "kaiming_normal"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        block.normal_(std=self.std(spec), generator=generator)
