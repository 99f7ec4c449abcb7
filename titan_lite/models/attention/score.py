"""From scores q k^T to the weights of the values."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.fields import PositiveFloat

EPS = 1e-6
"""Added to the sum that a row is divided by, which is 0 where no score is positive."""


class Score(Component):
    """What a kernel makes of scaled scores (B, H, T, S) and what each query may see.

    scores = capped(q k^T * scale) + bias, weights = weights(scores): a bias that falls with distance is not squashed.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "score"
        default_type: ClassVar[str | None] = "softmax"
        softmax: ClassVar[bool] = True
        """Whether the weights are a softmax, so that there is a log(sum(exp(scores)))."""

    cap: float = 0.0
    """The bound of `capped`; 0 = none."""

    def __init__(self, config: Config):
        self.config = config

    def capped(self, scores: Tensor) -> Tensor:
        """Scaled scores, element by element, as they are before the bias is added."""
        return scores

    def uncapped(self, grad: Tensor, capped: Tensor) -> Tensor:
        """The gradient of scaled scores, given that of what `capped` made of them."""
        return grad

    def weights(self, scores: Tensor, allowed: Tensor) -> Tensor:
        """float32 weights of scores that are -inf wherever `allowed`, broadcastable to (B, H, T, S), is False."""
        raise NotImplementedError


class Softmax(Score):
    """weights = softmax(scores) over what may be seen. Source: arXiv 1706.03762."""

    class Config(Score.Config):
        type: Literal["softmax"] = "softmax"

    def weights(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return scores.softmax(-1)


class CappedSoftmax(Score):
    """weights = softmax(c tanh(scores / c)) over what may be seen. Source: arXiv 2408.00118, section 2 (Gemma 2)."""

    class Config(Score.Config):
        type: Literal["softmax_capped"] = "softmax_capped"
        cap: PositiveFloat = 50.0
        """Bound c of the scores."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.cap = config.cap

    def capped(self, scores: Tensor) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def uncapped(self, grad: Tensor, capped: Tensor) -> Tensor:
        return grad * (1 - (capped / self.cap).square())

    def weights(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return scores.softmax(-1)


class Elementwise(Score):
    """weights = f(scores) / n, or f(scores) / (eps + sum of the row), for an f >= 0 with f(-inf) = 0.

    n is how many keys the query may see: its position + 1 under the causal mask alone. lucaslingle/mu_transformer,
    where these scores come from, divides by the row's length T instead. Then a token's output changes with the number
    of tokens behind it: a cache cannot decode that, and a packed document is not what it is alone. With n they agree.
    """

    class Config(Score.Config):
        softmax: ClassVar[bool] = False
        normalize: bool = False
        """Divide by the row's sum, so that the weights of a query add up to 1, not by the number of keys it sees."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.normalize = config.normalize

    def positive(self, scores: Tensor) -> Tensor:
        """f of the scores."""
        raise NotImplementedError

    def weights(self, scores: Tensor, allowed: Tensor) -> Tensor:
        values = self.positive(scores)
        divisor = EPS + values.sum(-1, keepdim=True) if self.normalize else allowed.sum(-1, keepdim=True)
        return values / divisor


class ReluSquared(Elementwise):
    """f(s) = max(s, 0)^2. Source: arXiv 2202.10447 (squared ReLU attention), 2309.08586 (division by the length)."""

    class Config(Elementwise.Config):
        type: Literal["relu_squared"] = "relu_squared"

    def positive(self, scores: Tensor) -> Tensor:
        return F.relu(scores).square()


class Elu(Elementwise):
    """f(s) = elu(s) + 1: exp(s) below 0, s + 1 above. Source: lucaslingle/mu_transformer; f from arXiv 2006.16236."""

    class Config(Elementwise.Config):
        type: Literal["elu"] = "elu"

    def positive(self, scores: Tensor) -> Tensor:
        return F.elu(scores) + 1
