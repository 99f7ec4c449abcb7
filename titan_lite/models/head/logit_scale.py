"""Factors of the logits."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.head.output import Link, LogitFunction
from titan_lite.models.learned_scale import LearnedScale
from titan_lite.models.module import Module


class LogitScale(Module):
    """What logits are multiplied by. Built as `build(dim=, vocab_size=)`."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "logit_scale"
        default_type: ClassVar[str | None] = "none"

    def links(self) -> tuple[Link, ...]:
        """The functions that logits go through."""
        raise NotImplementedError


class NoLogitScale(LogitScale):
    """z = x W^T + b."""

    class Config(LogitScale.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int, vocab_size: int):
        super().__init__()

    def links(self) -> tuple[Link, ...]:
        return ()


class ConstantLogitScale(LogitScale):
    """z = c (x W^T + b). Source: arXiv 2203.03466, appendix B (muP's output multiplier); Cohere's `logit_scale`."""

    class Config(LogitScale.Config):
        type: Literal["constant"] = "constant"
        value: PositiveFloat = Field(examples=[0.25])
        """c, for example 1 / 16 (a published `logits_scaling` of 16)."""

    def __init__(self, config: Config, dim: int, vocab_size: int):
        super().__init__()
        self.link = Link(Times(config.value))

    def links(self) -> tuple[Link, ...]:
        return (self.link,)


class LearnedLogitScale(LogitScale):
    """z = s_z * (x W^T + b) with a learned factor for each token, which starts at 1 and moves by sqrt(dim) * lr.

    Source: arXiv 2410.01131, section 2.1.
    """

    class Config(LogitScale.Config):
        type: Literal["learned"] = "learned"

    def __init__(self, config: Config, dim: int, vocab_size: int):
        super().__init__()
        self.s_z = LearnedScale(vocab_size, init=1.0, scale=dim**-0.5)

    def links(self) -> tuple[Link, ...]:
        return (Link(TIMES_EACH, self.s_z()),)


class Times(LogitFunction):
    """z = c u."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, u: Tensor, parameter: Tensor | None) -> Tensor:
        return u * self.factor

    def backward_(self, grad: Tensor, u: Tensor, parameter: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return grad.mul_(self.factor), None


class TimesEach(LogitFunction):
    """z = s * u with s (V,)."""

    def __call__(self, u: Tensor, parameter: Tensor | None) -> Tensor:
        assert parameter is not None
        return u * parameter

    def backward_(self, grad: Tensor, u: Tensor, parameter: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert parameter is not None
        of_parameter = u.mul_(grad).sum(dim=0)  # (V,)
        return grad.mul_(parameter), of_parameter


TIMES_EACH = TimesEach()
