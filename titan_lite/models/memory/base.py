"""The memory slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from titan_lite.config.component import Component, SlotConfig
from titan_lite.models.block import Layer
from titan_lite.models.context import Memory
from titan_lite.models.ranks import Ranks


class LaneMemory(Component):
    """What the rows of a step's global batch know of the steps before: each goes on where it ended, a lane of the data.

    Belongs to the training, not to the model. Built as `build(layers=, dim=, device=, dtype=, ranks=)`, with the
    choices of each executed layer, the dtype of activations and the ranks that share the model.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "memory"
        default_type: ClassVar[str | None] = "none"

        def span(self, seq_len: int) -> int:
            """Positions of a forward over segments of `seq_len` tokens, those in memory included."""
            return seq_len

    def of(self, rows: Tensor) -> SlotMemory | None:
        """What a micro-batch of these rows (numbers in the global batch) is told, and where its forward leaves things.

        None = nothing.
        """
        return None

    def state(self, rows: range) -> dict[str, Tensor]:
        """All there is of this rank's `rows`, by name, (len(rows), ...) each."""
        return {}

    def split_dim(self, name: str) -> int | None:
        """The dimension of a tensor of the state of which each of the ranks that share the model has a part; None where
        all of them have the same."""
        return None

    def restore(self, state: Mapping[str, Tensor], rows: range) -> None:
        """Goes on from what `state` gave."""


class SlotMemory(Memory):
    """The memory of one micro-batch."""

    def advance(self, documents: Tensor) -> None:
        """Makes what the forward over `documents` (B, T) left what the next one is told; call after each forward."""
        raise NotImplementedError


class NoLaneMemory(LaneMemory):
    """Each row starts from nothing."""

    class Config(LaneMemory.Config):
        type: Literal["none"] = "none"

    def __init__(
        self, config: Config, layers: list[Layer], dim: int, device: torch.device, dtype: torch.dtype, ranks: Ranks
    ):
        pass
