"""Dropout whose mask is a function of (seed, step, layer, place, global row), whatever the layout.

Nothing is drawn from a generator: each element's bits are a hash of what it is. So ranks and micro-batches can be cut
in any way, a recomputed activation drops what the first one dropped, and a compiled block has no state to keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn

_MASK = 0xFFFFFFFF


class Noise(NamedTuple):
    """What one micro-batch's dropout depends on."""

    key: Tensor
    """0-dim int64 below 2^32, from seed and step; a tensor, so that compiled blocks do not depend on its value."""
    rows: Tensor
    """(B,) int64, each row's number in the global batch."""

    @classmethod
    def of(cls, seed: int, step: int, rows: Tensor) -> Noise:
        """The noise of these rows of a step's global batch."""
        key = xxhash.xxh64_intdigest(f"dropout/{seed}/{step}".encode()) & _MASK
        return cls(torch.tensor(key, device=rows.device), rows)

    def layer(self, index: int) -> Noise:
        """Another key for each executed layer."""
        return self._replace(key=_mix(self.key + index + 1))


def _mix(x: Tensor) -> Tensor:
    """Spreads every bit of int64 values below 2^32 over all 32 bits (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


class NoDropout(nn.Module):
    """x, unchanged and without an operation."""

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        return x


class Dropout(nn.Module):
    """(B, ...) with each element zeroed with probability p and the others divided by 1 - p. Source: arXiv 1207.0580."""

    def __init__(self, p: float, place: str):
        super().__init__()
        self.p = p
        self.salt = xxhash.xxh64_intdigest(place.encode()) & _MASK

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        if noise is None:
            return x
        row = _mix(noise.key ^ _mix(noise.rows ^ self.salt))  # (B,)
        size = x[0].numel()
        bits = _mix(row[:, None] ^ torch.arange(size, device=x.device))  # (B, size)
        keep = (bits >= int(self.p * 2**32)).view(x.shape)
        return x * keep.to(x.dtype) / (1 - self.p)


def dropout(p: float, place: str) -> NoDropout | Dropout:
    """The dropout of this probability; `place` tells its draws from those of other places in the same layer."""
    return Dropout(p, place) if p else NoDropout()
