"""The embedding slot."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.embedding.lookup import Lookup, SplitLookup
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module
from titan_lite.models.ranks import Ranks
from titan_lite.parallel.plan import COL, Plan


class Embedding(Module):
    """Token ids (B, T), context -> (B, T, D). Holds `weight` (V, width), which a tied head reads.

    Built as `build(vocab_size=, dim=, linear=)`.
    """

    weight: nn.Parameter

    class Config(SlotConfig):
        slot: ClassVar[str] = "embedding"
        default_type: ClassVar[str | None] = "token"

    def __init__(self) -> None:
        super().__init__()
        self.lookup = Lookup()

    def tp_plan(self) -> Plan:
        return {"weight": COL}

    def split(self, ranks: Ranks) -> None:
        super().split(ranks)
        self.lookup = SplitLookup(ranks)

    def make_narrowing(self, linear: Linear.Config) -> nn.Module:
        """A new module from hidden states (..., D) to the width of the rows, for a tied head to hold."""
        return nn.Identity()

    def warm_start(self) -> None:
        """Fills rows that come from another model, once the initial weights are there."""
