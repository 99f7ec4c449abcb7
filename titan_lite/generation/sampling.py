"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from titan_lite.generation.steps import STEPS, LogitStep, Temperature, Texts

Generators: TypeAlias = Sequence[torch.Generator]


@dataclass(frozen=True)
class Sampling:
    """The numbers of `STEPS`, by their names."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, choices: object) -> Sampling:
        """From what has an attribute for each: a config, or options of a command line."""
        return cls(**{step.name: getattr(choices, step.name) for step in STEPS})

    def steps(self) -> list[LogitStep]:
        """Those that change something, in their order."""
        numbers = ((step, getattr(self, step.name)) for step in STEPS)
        return [step(value) for step, value in numbers if value != step.off]

    def idle(self) -> list[str]:
        """Names of the numbers that can have no effect: with temperature = 0 nothing is drawn."""
        if self.temperature:
            return []
        return [step.name for step in self.steps() if step.for_drawing and step.name != Temperature.name]

    def sampler(self) -> Sampler:
        """What chooses: the likeliest token where the temperature is 0, else one that is drawn."""
        if self.temperature:
            return Sampler(self.steps(), drawn)
        return Sampler([step for step in self.steps() if not step.for_drawing], likeliest)


class Sampler:
    """Logits (B, V) of the next tokens, the rows' texts so far, a generator for each -> B tokens."""

    def __init__(self, steps: Sequence[LogitStep], choose: Callable[[Tensor, Generators], list[int]]):
        self.steps, self.choose = steps, choose

    def __call__(self, logits: Tensor, texts: Texts, generators: Generators) -> list[int]:
        """Raises FloatingPointError where a logit is not a number or infinite."""
        if self.steps or self.choose is drawn:
            logits = wide(logits)
        for step in self.steps:
            logits = step(logits, texts)
        return self.choose(logits, generators)


def wide(logits: Tensor) -> Tensor:
    """In float64 on the CPU: a GPU's cumsum is not deterministic. FloatingPointError where some are not finite."""
    logits = logits.cpu().double()
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    return logits


def likeliest(logits: Tensor, generators: Generators) -> list[int]:
    """The tokens with the largest logits, the first ones of equals. The device is waited for once."""
    largest, tokens = logits.max(-1)
    values = torch.stack((largest.double(), tokens.double())).cpu()  # not a number, where one logit is not
    if not values[0].isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    return values[1].long().tolist()


def drawn(logits: Tensor, generators: Generators) -> list[int]:
    """Tokens with the probabilities softmax(logits): each generator draws one number, which falls into a token's part.

    The parts lie side by side from 0 to their sum, in the order of tokens.
    """
    ends = logits.softmax(-1).cumsum(-1)
    total = ends[:, -1:]
    draws = torch.stack([torch.rand(1, generator=each, dtype=torch.float64) for each in generators])
    # Below the sum also where their product is rounded up to it.
    points = (draws * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(ends, points, right=True)[:, 0].tolist()
