"""Bounds of the logits."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.head.output import Link, LogitFunction
from titan_lite.models.module import Module


class LogitCap(Module):
    """What keeps logits from growing without bound, behind their scale."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "logit_cap"
        default_type: ClassVar[str | None] = "none"

    def links(self) -> tuple[Link, ...]:
        """The functions that logits go through."""
        raise NotImplementedError


class NoLogitCap(LogitCap):
    """Logits as they are."""

    class Config(LogitCap.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config):
        super().__init__()

    def links(self) -> tuple[Link, ...]:
        return ()


class TanhLogitCap(LogitCap):
    """z = c tanh(u / c). Source: arXiv 2408.00118, section 2 (Gemma 2)."""

    class Config(LogitCap.Config):
        type: Literal["tanh"] = "tanh"
        cap: PositiveFloat = 30.0
        """Bound c of the logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.link = Link(Tanh(config.cap))

    def links(self) -> tuple[Link, ...]:
        return (self.link,)


class Tanh(LogitFunction):
    """z = c tanh(u / c), with the derivative 1 - tanh(u / c)^2."""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(self, u: Tensor, parameter: Tensor | None) -> Tensor:
        return (u / self.cap).tanh_() * self.cap

    def backward_(self, grad: Tensor, u: Tensor, parameter: Tensor | None) -> tuple[Tensor, Tensor | None]:
        slope = u.div_(self.cap).tanh_().square_().neg_().add_(1)
        return grad.mul_(slope), None
