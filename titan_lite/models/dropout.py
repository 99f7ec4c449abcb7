"""Dropout whose mask is a function of (seed, step, layer, place, global row), whatever the layout.

Nothing is drawn from a generator: each element's bits are a hash of what it is. So ranks and micro-batches can be cut
in any way, a recomputed activation drops what the first one dropped, and a compiled block has no state to keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from titan_lite.models.ranks import Ranks

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the keys of layers are this far apart."""


def _signed(value: int, bits: int = 64) -> int:
    """The integer of so many bits with two's complement sign that has the low bits of `value`."""
    half = 1 << (bits - 1)
    return (value + half) % (2 * half) - half


class Noise(NamedTuple):
    """What one micro-batch's dropout depends on."""

    key: Tensor
    """0-dim int64, from seed, step and layer; a tensor, so that compiled blocks do not depend on its value."""
    rows: Tensor
    """(B,) int64, each row's number in the global batch."""
    tokens: Tensor | None = None
    """(T,) positions of this rank's tokens, where it has not all of the rows'."""

    @classmethod
    def of(cls, seed: int, device: torch.device, step: int, rows: Tensor) -> Noise:
        """The noise of these rows of a step's global batch, on `device`."""
        digest = _signed(xxhash.xxh64_intdigest(f"dropout/{seed}/{step}".encode()))
        # A fill and not a copy, which would wait for the device.
        key = torch.full((), digest, dtype=torch.int64, device=device)
        return cls(key, rows.to(device, non_blocking=True))

    def layer(self, index: int) -> Noise:
        """Another key for each executed layer."""
        return self._replace(key=self.key + _signed((index + 1) * _GOLDEN))


def no_noise(step: int, rows: Tensor) -> None:
    """The noise of a model that drops nothing."""


def _mixed(x: Tensor) -> Tensor:
    """int64 with every bit spread over all 64 (the finaliser of splitmix64; products wrap)."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros from the left, which torch's shift of signed integers does not bring."""
    bits = 8 * x.element_size()
    return (x >> by).bitwise_and_((1 << (bits - by)) - 1)


class NoDropout(nn.Module):
    """x, unchanged and without an operation."""

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        return x


class Draw(nn.Module):
    """Random bits of elements, a function of what they are; `place` tells its draws from those of other places."""

    def __init__(self, place: str):
        super().__init__()
        self.salt = _signed(xxhash.xxh64_intdigest(place.encode()))
        self.part = 0

    def split(self, ranks: Ranks) -> None:
        """Told where the elements of a row are spread over ranks: each has the next ones, in equal parts."""
        self.part = self.part * ranks.size + ranks.rank

    def bits(self, noise: Noise, shape: Sequence[int]) -> Tensor:
        """(B, size) int32: `bits_of` the numbers 0, 1, 2... or, on one of several ranks, of those that are its own.

        `shape` is a row's here; its first dimension is that of the tokens where they are spread over ranks.
        """
        size = math.prod(shape)
        first = self.part * size
        number = torch.arange(first, first + size, dtype=torch.int32, device=noise.rows.device)
        if noise.tokens is not None:
            width = size // shape[0]
            place = noise.tokens.narrow(0, self.part * shape[0], shape[0]).to(torch.int32)
            number = (place[:, None] * width + number[:width] % width).flatten()
        return self.bits_of(noise, number)

    def bits_of(self, noise: Noise, number: Tensor) -> Tensor:
        """(B, size) int32 whose high bits are random: two keyed rounds of a hash of each element's number in its row.

        `number` (size,) int32 is overwritten.
        """
        row = _mixed(noise.key ^ _mixed(noise.rows ^ self.salt))  # (B,)
        first, second = ((row << 32) >> 32).to(torch.int32), (row >> 32).to(torch.int32)
        # Numbers that follow each other are spread first: rows whose keys differ in low bits would else be permutations
        # of each other. The constants are lowbias32's, found by search for an even spread.
        x = _round_(_round_(number, 16, 0x7FEB352D), 15, 0x846CA68B)
        x = x ^ first[:, None]
        x = _round_(x, 16, 0x7FEB352D)
        x.bitwise_xor_(_shifted(x, 15)).bitwise_xor_(second[:, None])
        return x.mul_(_signed(0x846CA68B, 32))


class Dropout(Draw):
    """(B, ...) with each element zeroed with probability p and the others divided by 1 - p. Source: arXiv 1207.0580.

    Takes 8 bytes per element while it works, and 1 until backward.
    """

    def __init__(self, p: float, place: str):
        super().__init__(place)
        self.factor = 1 / (1 - p)
        self.threshold = _signed(int(p * 2**32) - 2**31, 32)

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        if noise is None:
            return x
        return x * self.kept(self.bits(noise, x.shape[1:])).view(x.shape) * self.factor

    def kept(self, bits: Tensor) -> Tensor:
        """bool: which elements of such bits are not zeroed."""
        return bits >= self.threshold


def _round_(x: Tensor, shift: int, factor: int) -> Tensor:
    """(x ^ (x >> shift)) * factor in int32, in place."""
    return x.bitwise_xor_(_shifted(x, shift)).mul_(_signed(factor, 32))


def dropout(p: float, place: str) -> NoDropout | Dropout:
    """The dropout of this probability; `place` tells its draws from those of other places in the same layer."""
    return Dropout(p, place) if p else NoDropout()


def drops(model: nn.Module) -> bool:
    """Whether any part of the model drops, or else draws, anything in training."""
    return any(isinstance(module, Draw) for module in model.modules())
