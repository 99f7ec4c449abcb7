"""Orthogonal matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from titan_lite.config.fields import PositiveFloat
from titan_lite.models.init.base import Distribution
from titan_lite.models.spec import Spec


class Orthogonal(Distribution):
    """gain * Q with orthonormal rows or columns, whichever are fewer, Q uniformly distributed. Source: arXiv 1312.6120.

    No part of Q is known before the whole, so every rank makes each whole matrix and keeps its shard; the QR
    decomposition needs host memory of four times the matrix, 1 GB for 16384 x 4096. It rounds differently with every
    number of threads and therefore runs on one: half a second for 2048 x 2048, eight times that for twice the size.
    """

    class Config(Distribution.Config):
        type: Literal["orthogonal"] = "orthogonal"
        gain: PositiveFloat = 1.0
        """Length of the rows or columns."""

    def __init__(self, config: Config, dim: int, n_layers: int):
        super().__init__(config, dim, n_layers)
        self.gain = config.gain

    def rows(self, shape: Sequence[int]) -> int:
        """All rows of a matrix; one of a stack of matrices (E, rows, columns) at a time."""
        return shape[0] if len(shape) < 3 else 1

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        with _one_thread():
            for matrix in block if block.ndim > 2 else (torch.atleast_2d(block),):
                nn.init.orthogonal_(matrix, self.gain, generator)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
