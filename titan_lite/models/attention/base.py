"""The attention slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from titan_lite.config.component import SlotConfig
from titan_lite.models.attention.kernel import PreparedKernel
from titan_lite.models.module import Module
from titan_lite.models.position import Position


class Attention(Module):
    """(B, T, D), context -> (B, T, D), mixing tokens."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "attention"
        default_type: ClassVar[str | None] = "gqa"

        def leaves(self, dim: int) -> dict[str, tuple[int, int]]:
            """What a layer leaves for later ones, in a model of this width: its name, and its heads and their width."""
            return {}

    def shared(self) -> Iterator[Position | PreparedKernel]:
        """The parts that compute something once per forward."""
        raise NotImplementedError

    def score_flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of scores and weighted sum for one token of a row of `seq_len`, without a causal discount."""
        raise NotImplementedError
