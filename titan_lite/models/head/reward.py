"""What says how good a text is, beside the head that says how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module, Total
from titan_lite.models.spec import Spec

Rewards: TypeAlias = Callable[[Tensor], Tensor]
"""From the place of each row's last token, (B,), to the rewards (B,) of the texts that end there."""


def no_rewards(ends: Tensor) -> Tensor:
    """Of a model without a reward head."""
    raise NotImplementedError("the model has no reward head")


class RewardHead(Module):
    """(hidden states behind the final norm (B, T, D), ends (B,)) -> rewards (B,). Built as `build(dim=)`."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "reward"
        default_type: ClassVar[str | None] = "none"
        scores: ClassVar[bool] = True
        """Whether there are rewards."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        raise NotImplementedError

    def tell(self, chosen: Tensor, rejected: Tensor) -> None:
        """Adds up what the rewards (P,) of a micro-batch's pairs were."""


class NoRewardHead(RewardHead):
    """Only the language model."""

    class Config(RewardHead.Config):
        type: Literal["none"] = "none"
        scores: ClassVar[bool] = False

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return no_rewards(ends)


class LinearRewardHead(RewardHead):
    """r = w h + b, in float32, of the hidden state h at a text's last token. Logits are what they are without it.

    Source: arXiv 2405.20053 (Direct Preference Heads).
    """

    class Config(RewardHead.Config):
        type: Literal["linear"] = "linear"
        bias: bool = False
        """Add a learned b; transformers' classifiers have none, so that such a model is exported with code."""

    def __init__(self, config: Config, dim: int):
        super().__init__()
        # A vector of its own also where matrices are of unit length (nGPT), which would hold rewards between -1 and 1.
        self.weight = nn.Parameter(torch.empty(1, dim))
        self.bias = nn.Parameter(torch.empty(1)) if config.bias else None
        self._told: Tensor | None = None
        self._last: Tensor | None = None

    def param_specs(self) -> dict[str, Spec]:
        weight = {"weight": Spec("head", self.weight.shape[1], 1)}
        return weight if self.bias is None else weight | {"bias": Spec("bias", 1, 1, 0.0)}

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Of ranks that share the model, which all have the whole x, each makes the rewards of some rows."""
        rows = torch.arange(len(ends), device=ends.device)
        rewards = F.linear(x[rows, ends].float(), self.weight.float(), None if self.bias is None else self.bias.float())
        mine = rows % self.ranks.size == self.ranks.rank
        return self.ranks.sum_alike(rewards[:, 0].where(mine, 0.0))

    def tell(self, chosen: Tensor, rejected: Tensor) -> None:
        ones = torch.ones_like(chosen)
        told = torch.stack((ones, (chosen > rejected).float(), chosen - rejected, chosen, rejected)).detach().sum(1)
        self._told = told if self._told is None else self._told + told

    def after_step(self, total: Total) -> None:
        self._last, self._told = self._told, None

    def metrics(self, total: Total) -> dict[str, Tensor]:
        """Means over the step's pairs: how often the chosen text has the higher reward, by how much, and both."""
        if self._last is None:
            return {}
        n, *sums = total(self._last)
        names = ("accuracy", "margin", "chosen", "rejected")
        return {name: value / n for name, value in zip(names, sums, strict=True)}
