"""When iterating ends while a text is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Count, PositiveInt
from titan_lite.models.context import EarlyExit

if TYPE_CHECKING:
    from titan_lite.job import Job

Threshold: TypeAlias = Annotated[float, Field(ge=0)]
Watch: TypeAlias = Callable[[Tensor, Callable[[], Tensor]], bool]
"""Called after each iteration with the state and with what makes the stack's result of it, both (B, T, D): whether that
was the last one."""


class Exit(Component):
    """Says after which iteration to stop. Built as `build(mean=)`.

    Only decoding stops early: plain forwards and validation run `iterations`. All tokens of a call stop together, by
    what happens at the last position: prompts as a whole, then each new token by itself.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "exit"
        default_type: ClassVar[str | None] = "fixed"
        iterations: Count = 0
        """Iterations outside training, or the most of them; 0 = mean_iterations."""

    adaptive: ClassVar[bool] = False
    """Whether it ever stops before that."""

    def __init__(self, config: Config, mean: int):
        self.iterations = config.iterations or mean

    def watch(self, early: EarlyExit | None) -> Watch:
        """What looks at the iterations of one forward. `early` is None where nothing is decoded."""
        raise NotImplementedError


def never(state: Tensor, result: Callable[[], Tensor]) -> bool:
    """Goes on."""
    return False


class FixedExit(Exit):
    """The same number of iterations for every token. Source: arXiv 2502.05171, section 3."""

    class Config(Exit.Config):
        type: Literal["fixed"] = "fixed"

    def watch(self, early: EarlyExit | None) -> Watch:
        return never


class AdaptiveExit(Exit):
    """Stops once what is seen of an iteration differs from the last one by less than a threshold, `patience` times in a
    row. The first iteration has nothing to differ from.
    """

    class Config(Exit.Config):
        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if self.iterations == 1:
                kind = self.model_dump()["type"]
                why = f'has no effect: exit.type = "{kind}" compares an iteration with the one before'
                yield Problem(CROSS_FIELD, ".iterations", why, 1, 'at least 2, or exit.type = "fixed"')

    adaptive = True
    threshold: float = 0.0
    patience: int = 1

    def seen(self, state: Tensor, result: Callable[[], Tensor], early: EarlyExit) -> Tensor:
        """What is compared, a row of float64 for each of the batch: by default the next token's log-probabilities."""
        return F.log_softmax(early.look(result()).double(), dim=-1)  # (B, V)

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        """(B,), not negative."""
        raise NotImplementedError

    def watch(self, early: EarlyExit | None) -> Watch:
        if early is None:
            return never
        before: Tensor | None = None
        in_a_row = 0

        def stops(state: Tensor, result: Callable[[], Tensor]) -> bool:
            nonlocal before, in_a_row
            now = self.seen(state[:, -1], result, early)
            near = before is not None and bool((self.difference(before, now) < self.threshold).all())
            before, in_a_row = now, (in_a_row + 1) * near
            return bool(early.agree(int(in_a_row >= self.patience)))

        return stops


class ThresholdExit(AdaptiveExit):
    """An adaptive exit with one number to set."""

    class Config(AdaptiveExit.Config):
        threshold: Threshold

    def __init__(self, config: Config, mean: int):
        super().__init__(config, mean)
        self.threshold = config.threshold


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL(before || now) of log-probabilities (B, V), (B,) nats, not below 0 by rounding."""
    terms = torch.where(before.isneginf(), 0.0, before.exp() * (before - now))
    # Infinite where a token is gone; below a threshold of infinity all the same.
    return terms.sum(-1).clamp(min=0, max=torch.finfo(terms.dtype).max)


class KL(ThresholdExit):
    """Stops at KL(p_(i-1) || p_i) < threshold, p_i being the next token's distribution after i iterations.

    Source: arXiv 2502.05171, section 6.1.
    """

    class Config(ThresholdExit.Config):
        type: Literal["kl"] = "kl"
        threshold: Threshold = 5e-4
        """In nats; 5e-4 in the paper, 1e-3 in its code."""

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        return divergence(before, now)


class MinPKL(ThresholdExit):
    """`kl` of distributions that only have tokens at least min_p times as probable as the likeliest one.

    Source: github.com/seal-rg/recurrent-pretraining.
    """

    class Config(ThresholdExit.Config):
        type: Literal["min_p_kl"] = "min_p_kl"
        threshold: Threshold = 1e-5
        """In nats."""
        min_p: Annotated[float, Field(gt=0, le=1)] = 0.1
        """Least probability, in units of the largest one."""

    def __init__(self, config: Config, mean: int):
        super().__init__(config, mean)
        self.least = math.log(config.min_p)

    def seen(self, state: Tensor, result: Callable[[], Tensor], early: EarlyExit) -> Tensor:
        logits = early.look(result()).double()
        small = logits - logits.amax(-1, keepdim=True) < self.least
        return F.log_softmax(logits.masked_fill(small, -torch.inf), dim=-1)

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        return divergence(before, now)


class Entropy(ThresholdExit):
    """Stops once the entropy of the next token's distribution changes by less than the threshold.

    Source: github.com/seal-rg/recurrent-pretraining.
    """

    class Config(ThresholdExit.Config):
        type: Literal["entropy"] = "entropy"
        threshold: Threshold = 1e-3
        """In nats."""

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        first, second = (-(p.exp() * p).sum(-1) for p in (before, now))
        return (first - second).abs()


class ArgmaxStable(AdaptiveExit):
    """Stops once the likeliest next token has stayed the same for `steps` iterations.

    Source: github.com/seal-rg/recurrent-pretraining.
    """

    class Config(AdaptiveExit.Config):
        type: Literal["argmax_stable"] = "argmax_stable"
        steps: PositiveInt = 5
        """Iterations in a row that change nothing."""

    threshold = 0.5

    def __init__(self, config: Config, mean: int):
        super().__init__(config, mean)
        self.patience = config.steps

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        return (before.argmax(-1) != now.argmax(-1)).double()


class Latent(ThresholdExit):
    """Stops at |s_i - s_(i-1)| / |s_i| < threshold. Source: github.com/seal-rg/recurrent-pretraining."""

    class Config(ThresholdExit.Config):
        type: Literal["latent"] = "latent"
        threshold: Threshold = 0.03
        """Part of the state's length."""

    def seen(self, state: Tensor, result: Callable[[], Tensor], early: EarlyExit) -> Tensor:
        return state.double()

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        return (now - before).norm(dim=-1) / now.norm(dim=-1)


class Cosine(ThresholdExit):
    """Stops at 1 - cos(s_i, s_(i-1)) < threshold. Source: github.com/seal-rg/recurrent-pretraining."""

    class Config(ThresholdExit.Config):
        type: Literal["cosine"] = "cosine"
        threshold: Threshold = 1e-3
        """From 0 for one direction to 2 for opposite ones."""

    def seen(self, state: Tensor, result: Callable[[], Tensor], early: EarlyExit) -> Tensor:
        return state.double()

    def difference(self, before: Tensor, now: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(before, now, dim=-1)).clamp(min=0)
