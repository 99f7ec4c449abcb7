"""Absolute positions, added to token embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, ConfigError, Problem
from titan_lite.config.fields import Count, PositiveInt
from titan_lite.models.context import Context
from titan_lite.models.module import OnTokens
from titan_lite.models.spec import Spec

if TYPE_CHECKING:
    from titan_lite.job import Job


class AbsolutePosition(OnTokens):
    """(B, T, D), context -> (B, T, D) with each token's position added."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "embedding_position"
        default_type: ClassVar[str | None] = "none"


class NoAbsolutePosition(AbsolutePosition):
    """x."""

    class Config(AbsolutePosition.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x


def overruns(max_len: int, job: Job) -> Iterable[Problem]:
    """What of the job needs more positions than a table of `max_len` rows has."""
    needs = [("training.seq_len", job.training.seq_len)]
    needs += [("validation.seq_len", job.validation.seq_len)] * job.validation.enable
    # The last token that is sampled is not read again, but a prompt has at least one.
    needs += [("generation.max_new_tokens", job.generation.max_new_tokens)] * bool(job.generation.prompts)
    for key, length in needs:
        if length > max_len:
            why = f"has no position for every token: {key} is {length}"
            yield Problem(CROSS_FIELD, ".max_len", why, max_len, f"at least {length}, or a smaller {key}")


class PositionTable(AbsolutePosition):
    """Positions below `max_len`, each with a learned row of its own."""

    def __init__(self, max_len: int, dim: int):
        super().__init__()
        self.max_len, self.dim = max_len, dim
        self.weight = nn.Parameter(torch.empty(max_len, dim))

    def rows(self, x: Tensor, context: Context) -> Tensor:
        """(T, D), those of the tokens of x. Raises ConfigError where a token is behind the last position."""
        if context.length > self.max_len:
            why = f"has positions for {self.max_len} tokens, and this text has {context.length} or more"
            raise ConfigError.at("model.embedding.position.max_len", why, self.max_len, "shorter texts")
        return F.embedding(context.own_positions, self.weight)


class LearnedPosition(PositionTable):
    """x + P[position] with a learned P (max_len, D). Source: arXiv 1705.03122; GPT-2."""

    class Config(AbsolutePosition.Config):
        type: Literal["learned"] = "learned"
        max_len: PositiveInt = Field(examples=[2048])
        """Rows of P: the most tokens that a text may have, in training and in generation."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from overruns(self.max_len, job)

    def __init__(self, config: Config, dim: int):
        super().__init__(config.max_len, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + self.rows(x, context)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("embed", 1, self.dim)}


class SinusoidalPosition(AbsolutePosition):
    """x + P[position], P[t, 2i] = sin(t / 10000^(2i / D)), P[t, 2i + 1] = cos of the same; in float32.

    Source: arXiv 1706.03762, section 3.5.
    """

    class Config(AbsolutePosition.Config):
        type: Literal["sinusoidal"] = "sinusoidal"
        trainable: bool = False
        """Learn P, which starts as the sinusoids. What is stored, and decays where weights do, is its distance from
        them."""
        max_len: Count = 0
        """Rows of a trainable P; without training there is no limit, and this stays 0."""

        def build(self, *args: Any, **sizes: Any) -> AbsolutePosition:
            return (TrainableSinusoid if self.trainable else SinusoidalPosition)(self, *args, **sizes)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if not self.trainable and self.max_len:
                why = "has no effect with trainable = false: sinusoids have no end"
                yield Problem(CROSS_FIELD, ".max_len", why, self.max_len, "0, or trainable = true")
            if self.trainable and not self.max_len:
                why = "must be given with trainable = true: a learned table has an end"
                yield Problem(CROSS_FIELD, ".max_len", why, 0, f"at least {job.training.seq_len}")
            elif self.trainable:
                yield from overruns(self.max_len, job)

    def __init__(self, config: Config, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + sinusoids(context.own_positions, self.dim).to(x.dtype)


class TrainableSinusoid(PositionTable):
    """x + P[position] with a learned P (max_len, D) that starts as the sinusoids: see `SinusoidalPosition`."""

    def __init__(self, config: SinusoidalPosition.Config, dim: int):
        super().__init__(config.max_len, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + (sinusoids(context.own_positions, self.dim) + self.rows(x, context)).to(x.dtype)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("embed", 1, self.dim, 0.0)}


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """(T,) -> (T, dim) in float32: sine and cosine of each frequency side by side."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    angles = torch.outer(positions.float(), torch.exp(exponents * (-math.log(10000.0) / dim)))  # (T, ceil(dim / 2))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim]
