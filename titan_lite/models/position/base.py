"""The position slot, and the bias on scores that some encodings are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import Problem
from titan_lite.models.context import Context, LayerMemory
from titan_lite.models.module import Module
from titan_lite.models.ranks import Ranks


class ScoreBias:
    """What an encoding adds to scaled scores. This one: nothing."""

    key = ""
    """Equal for biases that are equal; empty = nothing is added."""

    def split(self, ranks: Ranks) -> None:
        """Leaves one rank's heads of those that it has."""

    def grid(self, q: Tensor, k: Tensor) -> Tensor | None:
        """float32, broadcastable to (H, T, S), for positions q (T, 1) and k (1, S); None = nothing is added."""
        return None

    def element(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The bias in float32 of heads and positions given as broadcastable index tensors, for kernels that ask score
        by score. Only where `key` is not empty."""
        raise NotImplementedError


class Position(Module):
    """Acts on queries (B, H, T, Dh) and keys (B, G, T, Dh), and extends the keys by those that came before.

    `prepare` runs once per forward for all layers with one `key`; its result comes back in `context.prepared[key]`.
    """

    key: str
    bias: ScoreBias = ScoreBias()

    class Config(SlotConfig):
        slot: ClassVar[str] = "position"
        default_type: ClassVar[str | None] = "rope"

        def head_problems(self, head_dim: int) -> Iterable[Problem]:
            """What is wrong with heads of this width; keys are relative to the attention."""
            return ()

        def score_factor(self) -> float:
            """What scores are multiplied by where a part of each head alone has positions (`MLA`)."""
            return 1.0

    def prepare(self, context: Context) -> Any:
        """What every layer with this encoding shares in one forward."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, prepared: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q with its positions, and all keys and values (B, G, S, ...) that it may see."""
        raise NotImplementedError

    def resting(self, k: Tensor, length: int) -> Tensor:
        """Keys (..., Dh) that have no position, in the size of those that have one in a text of `length` tokens."""
        return k
