"""What changes the logits of the next token before it is chosen: each step a class, in the order in which they act.

A step is called with logits (B, V) in float64 and with the tokens of each row so far, its prompt included; rows know
nothing of each other. -inf = never. The definitions, and their order, are those of transformers' logits processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

Texts = Sequence[Sequence[int]]
NEVER = float("-inf")


class LogitStep:
    """Built with its one number."""

    name: ClassVar[str]
    """On command lines, and in [generation]."""
    kind: ClassVar[type[int] | type[float]] = float
    off: ClassVar[float]
    """The number with which nothing changes."""
    what: ClassVar[str]
    """For --help."""
    allowed: ClassVar[str]
    """Legal numbers in words."""
    for_drawing: ClassVar[bool] = True
    """Whether the likeliest token stays the same, so that only a draw can tell."""

    @staticmethod
    def legal(value: float) -> bool:
        """Whether the number is allowed."""
        raise NotImplementedError

    def __init__(self, value: float):
        self.value = value

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        raise NotImplementedError


class RepetitionPenalty(LogitStep):
    """Logits of tokens that are in the text already, divided by the penalty, or multiplied where they are negative.

    Source: arXiv 1909.05858, section 4.1 (CTRL), without its restriction to positive logits.
    """

    name = "repetition_penalty"
    off = 1.0
    what = "logits of tokens that are in the text, prompt included, are divided by it (multiplied below 0)"
    allowed = "above 0"
    for_drawing = False

    @staticmethod
    def legal(value: float) -> bool:
        return 0 < value < float("inf")

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        logits = logits.clone()
        for row, text in zip(logits, texts, strict=True):
            seen = torch.tensor(sorted({token for token in text if token < len(row)}))
            of_seen = row[seen]
            row[seen] = torch.where(of_seen < 0, of_seen * self.value, of_seen / self.value)
        return logits


class Temperature(LogitStep):
    """Logits divided by the temperature, the largest one moved to 0: no temperature is too small."""

    name = "temperature"
    off = 1.0
    what = "logits are divided by it; 0 = always the likeliest token"
    allowed = "0 or more"

    @staticmethod
    def legal(value: float) -> bool:
        return 0 <= value < float("inf")

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        return (logits - logits.amax(-1, keepdim=True)) / self.value


class TopK(LogitStep):
    """The k likeliest tokens, and those that are as likely as the last of them. Source: arXiv 1805.04833, section 5."""

    name = "top_k"
    kind = int
    off = 0
    what = "choose among the k likeliest tokens; 0 = all"
    allowed = "0 or more"

    @staticmethod
    def legal(value: float) -> bool:
        return value >= 0

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        last = logits.topk(min(int(self.value), logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < last, NEVER)


class TopP(LogitStep):
    """The likeliest tokens that together reach the probability, the one that reaches it included.

    Source: arXiv 1904.09751, section 3.1 (nucleus sampling).
    """

    name = "top_p"
    off = 1.0
    what = "choose among the likeliest tokens that together have this probability; 1 = all"
    allowed = "above 0, at most 1"

    @staticmethod
    def legal(value: float) -> bool:
        return 0 < value <= 1

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        ordered, tokens = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        return _scattered(ordered.masked_fill(p.cumsum(-1) - p >= self.value, NEVER), tokens)


class MinP(LogitStep):
    """Tokens at least min_p times as likely as the likeliest one. Source: arXiv 2407.01082."""

    name = "min_p"
    off = 0.0
    what = "choose among tokens at least this times as likely as the likeliest one; 0 = all"
    allowed = "0 to 1"

    @staticmethod
    def legal(value: float) -> bool:
        return 0 <= value <= 1

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        p = logits.softmax(-1)
        return logits.masked_fill(p < self.value * p.amax(-1, keepdim=True), NEVER)


class TypicalP(LogitStep):
    """The tokens whose -log p is nearest to the entropy, that together reach the probability.

    Source: arXiv 2202.00666, section 3 (locally typical sampling).
    """

    name = "typical_p"
    off = 1.0
    what = "choose among the tokens of the most typical -log p that together have this probability; 1 = all"
    allowed = "above 0, at most 1"

    @staticmethod
    def legal(value: float) -> bool:
        return 0 < value <= 1

    def __call__(self, logits: Tensor, texts: Texts) -> Tensor:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).nansum(-1, keepdim=True)  # 0 log 0 is not a number
        tokens = (-log_p - entropy).abs().sort(stable=True).indices
        typical = p.gather(-1, tokens)
        left_out = typical.cumsum(-1) - typical >= self.value
        return _scattered(logits.gather(-1, tokens).masked_fill(left_out, NEVER), tokens)


def _scattered(ordered: Tensor, tokens: Tensor) -> Tensor:
    """Logits by token, of logits in the order of `tokens`."""
    return torch.empty_like(ordered).scatter_(-1, tokens, ordered)


STEPS: tuple[type[LogitStep], ...] = (RepetitionPenalty, Temperature, TopK, TopP, MinP, TypicalP)
"""All there are, in the order in which they act."""
