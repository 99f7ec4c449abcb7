"""What a forward pass tells its blocks. Passed down, never stored on a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titan_lite.models.dropout import Noise
from titan_lite.models.row import WHOLE, Row


class Iterations(NamedTuple):
    """How often a training step runs a core that is iterated."""

    ungraded: int
    """First iterations, which backward does not go through."""
    graded: int
    """The others."""


class EarlyExit(NamedTuple):
    """What decoding needs to stop iterating early."""

    look: Callable[[Tensor], Tensor]
    """From the stack's result (B, T, D) to the logits (B, V) of the next token."""
    agree: Callable[[int], int]
    """Makes one decision of those of all ranks that share a model."""


class Projects(Protocol):
    """An attention, as its memory sees it."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, T, width) of x (B, T, D)."""
        ...

    def project_beside(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, T, D); keys and values of `before` (B, C, D) and x together, C + T of them."""
        ...


class LayerMemory(Protocol):
    """Where one layer's keys and values go between calls."""

    def project(self, attention: Projects, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of this call's x (B, T, D), with keys and values of x and of what the memory holds of inputs."""
        return attention.project(x)

    def leave(self, x: Tensor, k: Tensor, v: Tensor, carry: dict[str, Tensor]) -> None:
        """Puts into `carry` what `Memory.keep` is to find: of the inputs, or of the keys before their positions."""
        return

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds this call's keys and values (B, G, T, Dh) and returns all that queries may attend to."""
        ...

    def take(self, other: Any, tokens: int) -> None:
        """Adds, of the layer that `other` belongs to, what this call's `tokens` tokens added there."""
        ...


class Memory(Protocol):
    """What earlier calls left for this one."""

    length: int
    """Tokens before those of this call."""
    recalled: int = 0
    """The first of them, which come from afar: all at position 0, one before the others'."""
    plain_keys: bool = False
    """Whether positions act on all keys in each call: keys are remembered without, since their positions change."""
    grows: bool = False
    """Whether each call finds more keys than the one before, as in decoding: then nothing is worth compiling for it."""

    def layer(self, index: int) -> LayerMemory:
        """The part that belongs to executed layer `index`."""
        ...

    def first_key(self, documents: Tensor | None) -> Tensor | None:
        """`Context.first_key` of a forward over tokens of `documents` (B, T)."""
        return None

    def keep(self, index: int, carry: dict[str, Tensor]) -> None:
        """Takes what executed layer `index` left in `carry` out of it. Outside of blocks, which may run twice."""
        return

    def see(self, x: Tensor) -> None:
        """Is shown the stack's result (B, T, D), before the final norm."""
        return


class NoMemory(Memory, LayerMemory):
    """Plain forward passes, and training without memory: nothing came before, nothing is kept."""

    length = 0

    def layer(self, index: int) -> NoMemory:
        return self

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def take(self, other: NoMemory, tokens: int) -> None:
        pass


class TrainingFacts(NamedTuple):
    """What training tells the model beside a micro-batch's tokens; each fact only where some part asks for it."""

    noise: Noise | None = None
    """What dropout draws from; None = nothing is dropped."""
    token_weight: Tensor | None = None
    """0-dim, 1 / tokens of the global batch's rows: the weight of one token in the auxiliary losses. None outside
    training, where nothing is counted either."""
    iterations: Iterations | None = None
    """For a recurrent stack; None = as often as outside training."""
    loss_weights: tuple[float, ...] = ()
    """For the objective: what its summed losses beside that of the next token are multiplied by, where that one is by
    1. Empty = they are not asked for."""


NOT_TRAINING = TrainingFacts()
"""Validation and decoding."""


class Context(NamedTuple):
    """Facts of one forward pass, shared by all blocks; the stack narrows memory and noise to the layer."""

    positions: Tensor
    """(T,) position of each query token; for those of keys see `key_positions`."""
    documents: Tensor | None
    """(B, T) document number of each token of the whole rows, or None where they are not packed."""
    memory: Any
    """A `Memory`; inside a block, its `LayerMemory`."""
    noise: Noise | None
    """What dropout draws from; None = nothing is dropped."""
    prepared: dict[str, Any]
    """What position encodings and attention kernels compute once per forward, by the key they chose."""
    carry: dict[str, Tensor]
    """What earlier layers of this forward left, by the name of the feature. A layer may add to it: see `Block`."""
    token_weight: Tensor | None = None
    """See `TrainingFacts`."""
    iterations: Iterations | None = None
    """For the stack alone: see `TrainingFacts`."""
    early_exit: EarlyExit | None = None
    """For the stack alone; None = nobody stops early."""
    first_key: Tensor | None = None
    """(B,), or (1,) for all rows: keys before this one are none of the row's, whatever masks say; None = all are."""
    recalled: int = 0
    """See `Memory`."""
    stream_positions: Tensor | None = None
    """Those of the tokens in this rank's part of the residual stream; None = `positions`."""
    row: Row = WHOLE
    """How each row's tokens are spread over ranks; of what is said per token here, this rank has its own."""

    @property
    def own_positions(self) -> Tensor:
        """(T,), or with tensor parallelism (T / n,): positions of the residual stream's tokens."""
        return self.positions if self.stream_positions is None else self.stream_positions

    @property
    def length(self) -> int:
        """Tokens up to the end of the rows, on whatever rank, those in memory included. Outside of blocks."""
        memory: Memory = self.memory
        return memory.length + self.row.size * self.positions.shape[0]

    @property
    def all_key_positions(self) -> Tensor:
        """Those of the keys that this rank's layers find: in memory and of its own tokens. Outside of blocks."""
        remembered = torch.arange(self.memory.length, device=self.positions.device)
        return torch.cat((key_positions(remembered, self.recalled), self.positions))

    def layer(self, index: int, carry: dict[str, Tensor]) -> Context:
        """The context of executed layer `index`, given what those before it left."""
        noise = None if self.noise is None else self.noise.layer(index)
        memory = self.memory.layer(index)
        return self._replace(memory=memory, noise=noise, carry=carry, iterations=None, early_exit=None)


def key_positions(keys: Tensor, recalled: int) -> Tensor:
    """Positions of keys, given their numbers: those, but that the first `recalled` share one."""
    return (keys - (recalled - 1)).clamp(min=0) if recalled else keys


def n_positions(n_keys: int, recalled: int) -> int:
    """How many different positions so many keys have."""
    return n_keys - recalled + 1 if recalled else n_keys
