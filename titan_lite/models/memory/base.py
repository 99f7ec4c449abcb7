"""The memory slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from titan_lite.config.component import Component, SlotConfig
from titan_lite.models.block import Layer
from titan_lite.models.context import Memory
from titan_lite.models.memory.whitening import NoSummaries
from titan_lite.models.ranks import Ranks

if TYPE_CHECKING:
    from titan_lite.models.memory.decoding import Decoding


class Piece(NamedTuple):
    """Some of the tokens of rows, (B, T) each, and what they are told of those before."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    memory: SlotMemory | None


class LaneMemory(Component):
    """What the rows of a step's global batch know of the steps before: each goes on where it ended, a lane of the data.

    Belongs to the training, not to the model. Built as `build(layers=, dim=, device=, dtype=, ranks=, summaries=)`,
    with the choices of each executed layer, the dtype of activations, the ranks that share the model, and what
    `Config.statistics` put into it.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "memory"
        default_type: ClassVar[str | None] = "none"

        def span(self, seq_len: int) -> int:
            """Positions of a forward over segments of `seq_len` tokens, those in memory included."""
            return seq_len

        def keys(self, seq_len: int) -> int:
            """Keys of such a forward: several may share a position."""
            return seq_len

        def anew(self, seq_len: int) -> float:
            """Remembered tokens whose keys and values such a forward makes again, for each of its own tokens."""
            return 0.0

        def statistics(self, dim: int) -> nn.Module:
            """What a model of width `dim` itself holds for its memory."""
            return NoSummaries()

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

    def nbytes(self, n_rows: int) -> int:
        """What it holds for so many rows."""
        return 0

    def reading(self, tokens: Tensor, targets: Tensor, documents: Tensor, seq_len: int) -> Iterator[Piece]:
        """What a validation runs forward on, one after the other, of rows (B, T) that begin with an empty memory.

        As a whole; where a memory takes part, in segments of `seq_len` tokens.
        """
        yield Piece(tokens, targets, documents, None)

    def decoding(self, seq_len: int) -> Decoding | None:
        """What one text that is decoded remembers, read in segments of `seq_len` tokens; None = all of itself."""
        return None


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
        self,
        config: Config,
        layers: list[Layer],
        dim: int,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        summaries: nn.Module,
    ):
        pass
