"""The stack slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.block import Layer
from titan_lite.models.context import Iterations
from titan_lite.models.module import Module


class Executions(NamedTuple):
    """How often a part of the model runs in one training forward."""

    forward: float
    graded: float
    """How many of these backward goes through."""


class Streams(NamedTuple):
    """What a stack made."""

    x: Tensor
    """(B, T, D), behind all layers."""
    trunk: Tensor
    """(B, T, D), before the last of them, or behind a core that is iterated."""
    carry: dict[str, Tensor]
    """What layers left for later ones."""


class Stack(Module):
    """(B, T, D), context -> `Streams` through all executed layers. Built as `build(dim=, layers=)`.

    Whatever is kept for each layer (memory, dropout's noise) is counted by executions; parameters belong to blocks.
    """

    blocks: nn.ModuleDict
    """The distinct blocks by number; a ModuleDict, so that names survive cutting the stack into stages."""
    executed: Sequence[int]
    """See `Config.executed`."""
    exits_early: bool = False
    """Whether decoding may run less of it, by what all the tokens of a call come to."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "stack"
        default_type: ClassVar[str | None] = "plain"
        normalises_stream: ClassVar[bool] = False
        """Whether its result is normalised already, so that the model needs no final norm."""

        def depth(self, n_layers: int) -> int:
            """Executed layers of a model with model.n_layers = n_layers, on average: what scales that depend on depth
            count."""
            return n_layers

        def executed(self, n_layers: int) -> Sequence[int]:
            """The number of the block that runs at each execution, in order."""
            return range(n_layers)

    def __init__(self, config: Config, layers: Sequence[Layer]):
        super().__init__()
        self.executed = config.executed(len(layers))

    def iterations(self, seed: int, step: int) -> Iterations | None:
        """What a step's forwards are told about how long to iterate; a function of its arguments alone."""
        return None

    def order(self) -> Iterator[nn.Module]:
        """The parts whose parameters are gathered together, as a forward runs them; what iterates, twice."""
        yield from self.blocks.values()

    def executions(self, iterations: Iterations | None = None) -> dict[nn.Module, Executions]:
        """How often each unit runs, where that is not once; on average over steps where `iterations` is not given."""
        return {}
