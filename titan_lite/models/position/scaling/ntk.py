"""Scaling by a change of the base theta: fast frequencies stay, slow ones are divided."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Count, NonNegativeFloat, PositiveFloat, PositiveInt
from titan_lite.models.position.rotation import Tables
from titan_lite.models.position.scaling.base import Scaling, Stretch, inverse_powers

if TYPE_CHECKING:
    from titan_lite.job import Job


class BaseScaling(Scaling):
    """(theta * s^(d / (d - 2)))^(-2j/d): the fastest frequency stays, the slowest is divided by s."""

    class Config(Scaling.Config):
        def rotation_problems(self, theta: float, width: int) -> Iterable[Problem]:
            if width <= 2:
                why = f"changes the base by a power d / (d - 2), but only d = {width} numbers of a head are rotated"
                yield Problem(
                    CROSS_FIELD, ".type", why, self.model_dump()["type"], "a larger head_dim or fraction, or no scaling"
                )

    def stretch(self, length: int) -> float:
        """s for a text of `length` tokens."""
        raise NotImplementedError

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        theta = self.theta * self.stretch(length) ** (self.width / (self.width - 2))
        return inverse_powers(theta, self.width, device)


class NTK(BaseScaling):
    """theta * factor^(d / (d - 2)) in place of theta: "NTK-aware". Source: arXiv 2309.00071, section 3.1."""

    class Config(BaseScaling.Config):
        type: Literal["ntk"] = "ntk"
        factor: Stretch = Field(examples=[8.0])
        """What the slowest frequency is divided by."""

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.factor = config.factor

    def stretch(self, length: int) -> float:
        return self.factor


class DynamicNTK(BaseScaling):
    """NTK that grows with the text. Source: arXiv 2309.00071, section 3.3; Hugging Face calls it "dynamic".

    s = factor * T / original_max_len - (factor - 1) for a text of T > original_max_len tokens, else 1.
    """

    class Config(BaseScaling.Config):
        type: Literal["dynamic_ntk"] = "dynamic_ntk"
        factor: Stretch = 1.0
        """How fast the base grows with the text; 1 = in proportion to it."""
        original_max_len: PositiveInt = Field(examples=[8192])
        """Tokens up to which nothing is scaled."""

        def moves(self) -> bool:
            return True

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.factor, self.original_max_len = config.factor, config.original_max_len

    def stretch(self, length: int) -> float:
        return self.factor * max(length, self.original_max_len) / self.original_max_len - (self.factor - 1)


class LSWT(BaseScaling):
    """NTK that grows with the square of the text, and so do scores, with its logarithm. Source: LSWTransformer.

    NTK with factor = ntk_scale * r^2, rotated queries and keys multiplied by a ln(r) + b, r = max(T / train_len, 1) for
    a text of T tokens. Without train_len: NTK with factor = ntk_scale. In github.com/Avelina9X/memory-transformer-pt4.
    """

    class Config(BaseScaling.Config):
        type: Literal["lswt"] = "lswt"
        ntk_scale: PositiveFloat = 1.0
        """What the slowest frequency is divided by at any length."""
        train_len: Count = 0
        """Tokens of a text in training, beyond which longer texts scale more; 0 = the same scaling at any length."""
        a: NonNegativeFloat = 0.07
        """Growth of queries and keys with the logarithm of the length."""
        b: PositiveFloat = 1.0
        """Size of queries and keys up to train_len."""

        def moves(self) -> bool:
            return self.train_len > 0

        def build(self, *args: Any, **sizes: Any) -> LSWT:
            return (LSWT if self.train_len else StaticLSWT)(self, *args, **sizes)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            fields = type(self).model_fields
            for key in ("a", "b") if not self.train_len else ():
                if getattr(self, key) != fields[key].default:
                    why = "acts only where the scaling depends on the length, but train_len is 0"
                    yield Problem(CROSS_FIELD, f".{key}", why, getattr(self, key), "train_len above 0")

    def __init__(self, config: Config, theta: float, width: int):
        super().__init__(config, theta, width)
        self.ntk_scale, self.train_len, self.a, self.b = config.ntk_scale, config.train_len, config.a, config.b

    def excess(self, length: int) -> float:
        """r."""
        return max(length / self.train_len, 1.0)

    def stretch(self, length: int) -> float:
        return self.ntk_scale * self.excess(length) ** 2

    def size(self, length: int) -> float:
        return self.a * math.log(self.excess(length)) + self.b

    def cos_sin(self, angles: Tensor, length: int) -> Tables:
        size = self.size(length)
        return angles.cos() * size, angles.sin() * size


class StaticLSWT(LSWT):
    """That of any length."""

    def stretch(self, length: int) -> float:
        return self.ntk_scale

    def size(self, length: int) -> float:
        return 1.0

    def cos_sin(self, angles: Tensor, length: int) -> Tables:
        return angles.cos(), angles.sin()
