"""Training batches, loaded in the background, each with the exact state to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from titan_lite.data.background import Background, LoaderSettings
from titan_lite.data.batch import IGNORE, Batch
from titan_lite.data.config import DataConfig
from titan_lite.data.documents import Group, Split
from titan_lite.data.lanes import Cursor, Seat, open_lanes, seats
from titan_lite.data.pieces import Framing
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.validation import validation_batches

__all__ = ["IGNORE", "Batch", "TrainBatches", "data_fingerprint", "train_batches", "validation_batches"]


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch, as a worker sends them."""

    tokens: npt.NDArray[np.int64]
    """(R, T + 1)"""
    documents: npt.NDArray[np.int32]
    """(R, T)"""
    cursors: list[Cursor]
    dropped: int


@dataclass(frozen=True)
class Part:
    """The rows that one worker makes."""

    seats: list[Seat]
    cursors: list[Cursor] | None


@dataclass(frozen=True)
class Parts:
    """What the workers do; called with a worker's number it opens its endless stream."""

    parts: Sequence[Part]
    framing: Framing
    seq_len: int

    def __call__(self, i: int) -> Iterator[Rows]:
        part = self.parts[i]
        lanes = open_lanes(part.seats, self.framing, self.seq_len, part.cursors)
        source = part.seats[0].group.split.source
        while True:
            rows = [lane.next_row() for lane in lanes]
            tokens = np.stack([tokens for tokens, _ in rows])
            documents = np.stack([documents for _, documents in rows])
            yield Rows(tokens, documents, [lane.cursor() for lane in lanes], source.dropped)


class TrainBatches(Iterator[Batch]):
    """Endless iterator over this rank's batches, one per optimizer step; `close` ends its worker processes."""

    def __init__(self, parts: Parts, order: Sequence[int], settings: LoaderSettings) -> None:
        """`order`: for each row of the batch its place in the workers' rows laid end to end."""
        self._n_parts = len(parts.parts)
        self._order = list(order)
        self._pin = settings.pin_memory and torch.cuda.is_available()
        self._items = Background(parts, self._n_parts, settings)

    def __next__(self) -> Batch:
        parts: list[Rows] = [next(self._items) for _ in range(self._n_parts)]
        tokens = torch.from_numpy(np.concatenate([part.tokens for part in parts])[self._order])
        documents = torch.from_numpy(np.concatenate([part.documents for part in parts])[self._order])
        cursors = [cursor for part in parts for cursor in part.cursors]
        batch = Batch(
            tokens=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            documents=documents,
            cursors=[cursors[i] for i in self._order],
            dropped=sum(part.dropped for part in parts),
        )
        return batch.pin_memory() if self._pin else batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._items.close()


def train_batches(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    lanes: int,
    rows: range,
    seed: int,
    settings: LoaderSettings,
    cursors: Sequence[Cursor] | None = None,
) -> TrainBatches:
    """This rank's `rows` of every global batch of `lanes` rows, from the start or from `cursors` (one for each row) on.

    The global batch of step t depends on (data, tokenizer, seq_len, lanes, seed, t) alone: not on which ranks or how
    many workers load it (at most one worker per row), nor on where it was resumed.
    """
    split = Split(data.source.build(), data.held_out, held_out=False)
    split.require_documents()
    shards = tuple(split.source.shards())
    n_groups = min(len(shards), lanes)
    groups = [Group(split, shards, k, n_groups, seed, data.shuffle) for k in range(n_groups)]
    mine = seats(groups, lanes, rows)
    # Lanes of one group side by side, so that few workers read the same shards.
    by_group = sorted(range(len(rows)), key=lambda i: (mine[i].group.k, i))
    n_parts = max(1, min(settings.num_workers, len(rows)))
    parts = [
        Part([mine[i] for i in part], None if cursors is None else [cursors[i] for i in part])
        for part in np.array_split(by_group, n_parts)
    ]
    return TrainBatches(Parts(parts, Framing.of(tokenizer, data.bos), seq_len), np.argsort(by_group).tolist(), settings)


def data_fingerprint(data: DataConfig) -> str:
    """xxh3-128 (hex) of everything but the seed that decides which documents come when."""
    content = f"{data.source.build().fingerprint()} {data.held_out!r} {data.shuffle} {data.bos}"
    return xxhash.xxh3_128_hexdigest(content.encode())
