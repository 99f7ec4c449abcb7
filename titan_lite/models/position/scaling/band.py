"""Scaling by bands: frequencies that turn often stay, those that turn seldom are divided, and it fades between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import NonNegativeFloat, PositiveFloat, PositiveInt
from titan_lite.models.position.rotation import Tables
from titan_lite.models.position.scaling.base import Scaling, Stretch

if TYPE_CHECKING:
    from titan_lite.job import Job


class Reaching(Scaling):
    """Scaling from one length of text to another."""

    class Config(Scaling.Config):
        factor: Stretch = Field(examples=[8.0])
        """How many times longer than original_max_len texts may become."""
        original_max_len: PositiveInt = Field(examples=[8192])
        """Tokens of a text before the scaling."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            reach = int(self.factor * self.original_max_len)
            span = job.model.memory.span(job.training.seq_len)
            if span > reach:
                memory = f", and model.memory has {n} more" if (n := span - job.training.seq_len) else ""
                why = (
                    f"with original_max_len = {self.original_max_len} reaches {reach} positions, "
                    f"but training.seq_len is {job.training.seq_len}{memory}"
                )
                need = math.ceil(span / self.original_max_len)
                yield Problem(CROSS_FIELD, ".factor", why, self.factor, f"at least {need}, or a shorter seq_len")

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.factor, self.original_max_len = config.factor, config.original_max_len

    def blend(self, frequencies: Tensor, kept: Tensor) -> Tensor:
        """f where kept = 1, f / factor where kept = 0, and between."""
        return frequencies * (kept + (1 - kept) / self.factor)


class Llama3(Reaching):
    """Frequencies that turn seldom are divided by factor. Source: Llama 3.1 as released (arXiv 2407.21783).

    Over original_max_len positions: those that turn more than high_freq_factor times stay, those that turn less than
    low_freq_factor times are divided, linear in the number of turns between.
    """

    class Config(Reaching.Config):
        type: Literal["llama3"] = "llama3"
        low_freq_factor: PositiveFloat = 1.0
        """Turns below which a frequency is fully scaled."""
        high_freq_factor: PositiveFloat = 4.0
        """Turns above which a frequency stays."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            if self.low_freq_factor >= self.high_freq_factor:
                why = f"must be below high_freq_factor ({self.high_freq_factor}): between them the scaling fades out"
                allowed = f"below {self.high_freq_factor}"
                yield Problem(CROSS_FIELD, ".low_freq_factor", why, self.low_freq_factor, allowed)

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.low, self.high = config.low_freq_factor, config.high_freq_factor

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        frequencies = super().frequencies(length, device)
        turns = frequencies * (self.original_max_len / (2 * math.pi))
        return self.blend(frequencies, ((turns - self.low) / (self.high - self.low)).clamp(0, 1))


class YaRN(Reaching):
    """Frequencies that turn seldom are divided by factor, and scores grow. Source: arXiv 2309.00071.

    Over original_max_len positions: those that turn more than beta_fast times stay, those that turn less than beta_slow
    times are divided, linear in j between. cos and sin are multiplied by attention_factor.
    """

    class Config(Reaching.Config):
        type: Literal["yarn"] = "yarn"
        beta_fast: PositiveFloat = 32.0
        """Turns above which a frequency stays."""
        beta_slow: PositiveFloat = 1.0
        """Turns below which a frequency is fully scaled."""
        attention_factor: PositiveFloat | None = None
        """Size of rotated queries and keys; not given = m(1), or m(mscale) / m(mscale_all_dim), where
        m(c) = 0.1 c ln(factor) + 1."""
        mscale: NonNegativeFloat = 0.0
        """c of the numerator (DeepSeek); 0 = not used."""
        mscale_all_dim: NonNegativeFloat = 0.0
        """c of the denominator (DeepSeek), and of m(c)^2, a factor of all scores of attention "mla"; 0 = not used."""
        truncate: bool = True
        """Begin and end the linear part at whole j, further out (gpt-oss does not)."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from super().problems(job, world_size)
            if self.beta_slow >= self.beta_fast:
                why = f"must be below beta_fast ({self.beta_fast}): between them the scaling fades out"
                yield Problem(CROSS_FIELD, ".beta_slow", why, self.beta_slow, f"below {self.beta_fast}")
            if self.attention_factor is not None and (self.mscale or self.mscale_all_dim):
                why = "leaves nothing for mscale and mscale_all_dim to decide"
                allowed = "attention_factor alone, or the other two"
                yield Problem(CROSS_FIELD, ".attention_factor", why, self.attention_factor, allowed)
            elif bool(self.mscale) != bool(self.mscale_all_dim):
                given, lacking = ("mscale", "mscale_all_dim") if self.mscale else ("mscale_all_dim", "mscale")
                why = f"acts only together with {lacking}, which is 0"
                allowed = f"{lacking} above 0 as well, or neither"
                yield Problem(CROSS_FIELD, f".{given}", why, getattr(self, given), allowed)

        def rotation_problems(self, theta: float, width: int) -> Iterable[Problem]:
            if theta <= 1:
                why = f"needs frequencies that fall with j, but position.theta is {theta}"
                yield Problem(CROSS_FIELD, ".type", why, "yarn", "theta above 1, or no scaling")

        def score_factor(self) -> float:
            return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1) ** 2

        def amplitude(self) -> float:
            """What cos and sin are multiplied by."""
            if self.attention_factor is not None:
                return self.attention_factor
            log = 0.1 * math.log(self.factor)
            if self.mscale:
                return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
            return log + 1

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.amplitude = config.amplitude()
        first, last = self.index(config.beta_fast), self.index(config.beta_slow)
        if config.truncate:
            first, last = math.floor(first), math.ceil(last)
        self.first, self.last = max(first, 0), min(last, width - 1)

    def index(self, turns: float) -> float:
        """j, as a real number, of the frequency that turns that often over original_max_len positions."""
        return self.width * math.log(self.original_max_len / (2 * math.pi * turns)) / (2 * math.log(self.theta))

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        # Where the band is empty, a step takes its place.
        band = max(self.last - self.first, 1e-3)
        fading = (torch.arange(self.width // 2, dtype=torch.float32, device=device) - self.first) / band
        return self.blend(super().frequencies(length, device), 1 - fading.clamp(0, 1))

    def size(self, length: int) -> float:
        return self.amplitude

    def cos_sin(self, angles: Tensor, length: int) -> Tables:
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude
