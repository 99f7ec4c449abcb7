"""Training batches, loaded in the background, each with the exact state to go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.data.background import Background, LoaderSettings
from titan_lite.data.batch import IGNORE, Batch
from titan_lite.data.config import DataConfig
from titan_lite.data.documents import Group, Split
from titan_lite.data.lanes import Cursor, Lane, Rows, Seat, lane_of, open_lanes, seats
from titan_lite.data.pieces import Framing
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.validation import validation_batches

log = logging.getLogger(__name__)

__all__ = ["IGNORE", "Batch", "TrainBatches", "data_fingerprint", "train_batches", "validation_batches"]


class Made(NamedTuple):
    """Some rows of a batch, as a worker sends them."""

    rows: Rows
    cursors: list[Cursor]
    """One for each row; rows of one lane have the same."""
    dropped: int


@dataclass(frozen=True)
class Part:
    """The rows that one worker makes."""

    seats: list[Seat]
    cursors: list[Cursor] | None


@dataclass(frozen=True)
class Parts:
    """What the workers do; called with a worker's number it opens its endless stream."""

    lane: type[Lane]
    parts: Sequence[Part]
    framing: Framing
    seq_len: int

    def __call__(self, i: int) -> Iterator[Made]:
        part = self.parts[i]
        lanes = open_lanes(self.lane, part.seats, self.framing, self.seq_len, part.cursors)
        source = part.seats[0].group.split.source
        while True:
            rows = together([lane.next_rows() for lane in lanes])
            cursors = [cursor for lane in lanes for cursor in [lane.cursor()] * lane.n_rows]
            yield Made(rows, cursors, source.dropped)


def together(parts: Sequence[Rows]) -> Rows:
    """Rows of several lanes, or workers, one below the other."""
    tokens, documents, learned = zip(*parts, strict=True)
    masks = [mask for mask in learned if mask is not None]
    return Rows(np.concatenate(tokens), np.concatenate(documents), np.concatenate(masks) if masks else None)


class TrainBatches(Iterator[Batch]):
    """Endless iterator over this rank's batches, one per optimizer step; `close` ends its worker processes."""

    def __init__(self, parts: Parts, order: Sequence[int], settings: LoaderSettings) -> None:
        """`order`: for each row of the batch its place in the workers' rows laid end to end."""
        self._told = 0
        self._n_parts = len(parts.parts)
        self._order = list(order)
        self._pin = settings.pin_memory and torch.cuda.is_available()
        self._items = Background(parts, self._n_parts, settings)

    def __next__(self) -> Batch:
        parts: list[Made] = [next(self._items) for _ in range(self._n_parts)]
        rows = together([part.rows for part in parts])
        tokens = torch.from_numpy(rows.tokens[self._order])
        targets = tokens[:, 1:].contiguous()
        if rows.learned is not None:
            targets.masked_fill_(~torch.from_numpy(rows.learned[self._order]), IGNORE)
        cursors = [cursor for part in parts for cursor in part.cursors]
        batch = Batch(
            tokens=tokens[:, :-1].contiguous(),
            targets=targets,
            documents=torch.from_numpy(rows.documents[self._order]),
            cursors=[cursors[i] for i in self._order],
            dropped=sum(part.dropped for part in parts),
        )
        self._tell(batch.dropped)
        return batch.pin_memory() if self._pin else batch

    def _tell(self, dropped: int) -> None:
        """A line for the first document that was left out, and each time there are ten times as many."""
        if dropped >= max(1, 10 * self._told):
            self._told = dropped
            why = "without text, not to be decoded, or a pair of more than training.seq_len tokens"
            log.warning("%d documents were left out so far: %s", dropped, why)

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
    lane, framing = lane_of(split.source), Framing.of(tokenizer, data.bos)
    if lane.n_rows > 1 and (rows.start % lane.n_rows or rows.stop % lane.n_rows):
        why = f"its rows come in pairs, and a rank's share of them is {len(rows)}"
        raise ConfigError.at("training.global_batch_size", why, lanes, code=CROSS_FIELD)
    lane.require(split, framing, seq_len)
    shards = tuple(split.source.shards())
    n_lanes, mine = lanes // lane.n_rows, range(rows.start // lane.n_rows, rows.stop // lane.n_rows)
    n_groups = min(len(shards), n_lanes)
    groups = [Group(split, shards, k, n_groups, seed, data.shuffle) for k in range(n_groups)]
    places = seats(groups, n_lanes, mine)
    # Lanes of one group side by side, so that few workers read the same shards.
    by_group = sorted(range(len(mine)), key=lambda i: (places[i].group.k, i))
    n_parts = max(1, min(settings.num_workers, len(mine)))
    of_lanes = None if cursors is None else cursors[:: lane.n_rows]
    parts = [
        Part([places[i] for i in part], None if of_lanes is None else [of_lanes[i] for i in part])
        for part in np.array_split(by_group, n_parts)
    ]
    order = np.argsort(by_group)[:, None] * lane.n_rows + np.arange(lane.n_rows)
    return TrainBatches(Parts(lane, parts, framing, seq_len), order.flatten().tolist(), settings)


def data_fingerprint(data: DataConfig) -> str:
    """xxh3-128 (hex) of everything but the seed that decides which documents come when."""
    content = f"{data.source.build().fingerprint()} {data.held_out!r} {data.shuffle} {data.bos}"
    return xxhash.xxh3_128_hexdigest(content.encode())
