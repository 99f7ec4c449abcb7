"""What a forward pass tells its blocks. Passed down, never stored on a module."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from titan_lite.models.dropout import Noise


class LayerMemory(Protocol):
    """Where one layer's keys and values go between calls."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds this call's keys and values (B, G, T, Dh) and returns all that queries may attend to."""
        ...


class Memory(Protocol):
    """What earlier calls left for this one."""

    length: int
    """Tokens seen before this call."""

    def layer(self, index: int) -> LayerMemory:
        """The part that belongs to executed layer `index`."""
        ...


class NoMemory:
    """Training and plain forward passes: nothing came before, nothing is kept."""

    length = 0

    def layer(self, index: int) -> NoMemory:
        return self

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


class Context(NamedTuple):
    """Facts of one forward pass, shared by all blocks; the stack narrows memory and noise to the layer."""

    positions: Tensor
    """(T,) position of each query token; keys are counted from 0 up to the last query."""
    documents: Tensor | None
    """(B, T) document number of each token, or None where the rows are not packed."""
    memory: Any
    """A `Memory`; inside a block, its `LayerMemory`."""
    noise: Noise | None
    """What dropout draws from; None = nothing is dropped."""
    prepared: dict[str, Any]
    """What position encodings and attention kernels compute once per forward, by the key they chose."""
    carry: dict[str, Tensor]
    """What earlier layers of this forward left, by the name of the feature. A layer may add to it: see `Block`."""

    def layer(self, index: int, carry: dict[str, Tensor]) -> Context:
        """The context of executed layer `index`, given what those before it left."""
        noise = None if self.noise is None else self.noise.layer(index)
        return self._replace(memory=self.memory.layer(index), noise=noise, carry=carry)
