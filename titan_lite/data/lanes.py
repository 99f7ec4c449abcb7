"""Lanes: row r of every batch is one endless text that goes on from step to step, or each two rows a stream of pairs.

Lane r belongs to group r % K and takes every n-th document of that group's stream, n being the group's number of lanes.
What it gives is therefore the same whether its neighbours live in the same process or in another one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from titan_lite.config.errors import ConfigError
from titan_lite.data.documents import START, Document, Group, Place, Split
from titan_lite.data.pieces import Framing, piece_end
from titan_lite.data.source import Source

Cursor = dict[str, int]

QUEUED_CHARACTERS = 1 << 26
"""What a reader keeps for lanes that are behind; a lane that falls further behind reads for itself."""


class Reader:
    """One pass over a group's stream for several of its lanes, with a queue for each."""

    def __init__(self, group: Group, n_lanes: int, places: Sequence[Place], wanted: dict[int, int]) -> None:
        """`wanted`: {lane's number in the group: ordinal of its first document}; `places`: where their blocks begin."""
        self._stream = group.documents(min(places, key=lambda place: place.ordinal))
        self._n_lanes = n_lanes
        self._first = wanted
        self._queues: dict[int, deque[Document]] = {lane: deque() for lane in wanted}
        self._queued = 0

    def __contains__(self, lane: int) -> bool:
        return lane in self._queues

    def next(self, lane: int) -> Document:
        """The lane's next document."""
        queue = self._queues[lane]
        while not queue:
            self._pull(lane)
        document = queue.popleft()
        self._queued -= len(document.text)
        return document

    def _pull(self, for_lane: int) -> None:
        document = next(self._stream)
        lane = document.ordinal % self._n_lanes
        if lane in self._queues and document.ordinal >= self._first[lane]:
            self._queues[lane].append(document)
            self._queued += len(document.text)
            if self._queued > QUEUED_CHARACTERS:
                self._give_up_laggard(for_lane)

    def _give_up_laggard(self, for_lane: int) -> None:
        """Empties the longest queue but `for_lane`'s; its lane will open a reader of its own."""
        sizes = {lane: sum(len(d.text) for d in queue) for lane, queue in self._queues.items() if lane != for_lane}
        if sizes:
            laggard = max(sizes, key=lambda lane: sizes[lane])
            del self._queues[laggard]
            self._queued -= sizes[laggard]


@dataclass(frozen=True)
class Seat:
    """Who a lane is."""

    row: int
    group: Group
    number: int
    """Among the group's lanes."""
    n_lanes: int
    """Of the group."""


class Rows(NamedTuple):
    """The next rows of some lanes."""

    tokens: npt.NDArray[np.int64]
    """(R, T + 1): inputs, and the token after the last one."""
    documents: npt.NDArray[np.int32]
    """(R, T), as `Batch.documents`."""
    learned: npt.NDArray[np.bool_] | None = None
    """(R, T): of which inputs the token after is a target; None = of all."""


class Lane:
    """Some rows of every batch, made of every n-th document of a group."""

    n_rows: ClassVar[int]
    """Rows of a batch that a lane makes."""

    def __init__(self, seat: Seat, framing: Framing, seq_len: int, cursor: Cursor | None) -> None:
        self.seat = seat
        self.reader: Reader | None = None
        self._framing = framing
        self._seq_len = seq_len
        self._goal = cursor or {**START._asdict(), "document": seat.number, "piece": 0, "offset": 0}
        self.place = Place(*(self._goal[name] for name in Place._fields))
        self.ordinal = self._goal["document"]

    @classmethod
    def require(cls, split: Split, framing: Framing, seq_len: int) -> None:
        """Raises ConfigError if a split has nothing to make rows of: training would look for it for ever."""
        split.require_documents()

    def next_rows(self) -> Rows:
        """The lane's part of the next batch."""
        raise NotImplementedError

    def cursor(self) -> Cursor:
        """Where the next rows begin."""
        raise NotImplementedError

    def read(self, ordinal: int) -> str:
        """The text of the lane's document of this number."""
        number = self.seat.number
        if self.reader is None or number not in self.reader:
            self.reader = Reader(self.seat.group, self.seat.n_lanes, [self.place], {number: ordinal})
        document = self.reader.next(number)
        assert document.ordinal == ordinal, "a reader skipped a document"
        text, self.ordinal, self.place = document
        return text


class TextLane(Lane):
    """One row: documents framed by their specials, laid end to end, cut every `seq_len` tokens."""

    n_rows = 1

    def __init__(self, seat: Seat, framing: Framing, seq_len: int, cursor: Cursor | None) -> None:
        super().__init__(seat, framing, seq_len, cursor)
        self._text = ""
        self._piece = 0
        self._piece_end = 0
        self._ids = np.empty(0, dtype=np.int64)
        self._at = 0
        self._open = False

    def next_rows(self) -> Rows:
        """The last token is the first of the next row.

        Documents are counted from the one that the row before ended in, which is 0.
        """
        if not self._open:
            self._go_to_cursor()
        tokens = np.empty(self._seq_len + 1, dtype=np.int64)
        documents = np.empty(self._seq_len + 1, dtype=np.int32)
        filled, document = 0, int(self._piece == self._at == 0)
        while True:
            n = min(len(tokens) - filled, len(self._ids) - self._at)
            tokens[filled : filled + n] = self._ids[self._at : self._at + n]
            documents[filled : filled + n] = document
            filled += n
            self._at += n
            if filled == len(tokens):
                break
            if self._piece_end < len(self._text):
                self._load_piece(self._piece_end)
            else:
                self._load_document(self.ordinal + self.seat.n_lanes)
                document += 1
        self._at -= 1
        return Rows(tokens[None], documents[None, :-1])

    def cursor(self) -> Cursor:
        here = {"document": self.ordinal, "piece": self._piece, "offset": self._at}
        return {"lane": self.seat.row, **self.place._asdict(), **(here if self._open else self._goal)}

    def _go_to_cursor(self) -> None:
        self._load_document(self.ordinal)
        if self._goal["piece"]:
            self._load_piece(self._goal["piece"])
        self._at = self._goal["offset"]
        if self._piece > len(self._text) or self._at >= len(self._ids):
            raise self.seat.group.split.source.error(
                "a document is shorter than when the checkpoint was saved: the data changed"
            )
        self._open = True

    def _load_document(self, ordinal: int) -> None:
        self._text = self.read(ordinal)
        self._load_piece(0)

    def _load_piece(self, start: int) -> None:
        self._piece = start
        self._piece_end = piece_end(self._text, start)
        self._ids = self._framing.encode(self._text, start, self._piece_end)
        self._at = 0


class PairLane(Lane):
    """Two rows: a better and a worse text, each from the row's beginning on. Pairs that do not fit are left out."""

    n_rows = 2

    @classmethod
    def require(cls, split: Split, framing: Framing, seq_len: int) -> None:
        super().require(split, framing, seq_len)
        if all(pair_rows(text, framing, seq_len) is None for text in split.documents()):
            raise none_fits(split.source, seq_len)
        split.source.dropped = 0

    def next_rows(self) -> Rows:
        source, first = self.seat.group.split.source, self.place.epoch
        while True:
            text = self.read(self.ordinal)
            self.ordinal += self.seat.n_lanes
            if (rows := pair_rows(text, self._framing, self._seq_len)) is not None:
                return rows
            source.dropped += 1
            if self.place.epoch - first > 2 * self.seat.n_lanes * self.seat.group.n_groups:
                raise none_fits(source, self._seq_len)

    def cursor(self) -> Cursor:
        return {"lane": self.seat.row, **self.place._asdict(), "document": self.ordinal, "piece": 0, "offset": 0}


def none_fits(source: Source, seq_len: int) -> ConfigError:
    """The error about pairs that are all too long."""
    return source.error(f"{source.describe()}: no pair fits into rows of {seq_len} tokens")


def pair_rows(text: str, framing: Framing, seq_len: int) -> Rows | None:
    """The two rows of a pair, as `Pairs` reads it; None where a text has more than `seq_len` tokens.

    A text is document 0 of its row, ends with the end of text, and is filled up with that as document 1. Targets are
    the tokens of the better answer.
    """
    prompt, *answers = json.loads(text)
    before = framing.encode(prompt, 0, len(prompt))[:-1]
    tokens = np.full((2, seq_len + 1), framing.tokenizer.eos_id, dtype=np.int64)
    documents = np.ones((2, seq_len), dtype=np.int32)
    learned = np.zeros((2, seq_len), dtype=np.bool_)
    for row, answer in enumerate(answers):
        end = [framing.tokenizer.eos_id]
        ids = np.concatenate((before, framing.tokenizer.encode(answer, continued=bool(prompt)), end))
        if len(ids) > seq_len:
            return None
        tokens[row, : len(ids)] = ids
        documents[row, : len(ids)] = 0
        if row == 0:
            learned[row, max(len(before) - 1, 0) : len(ids) - 1] = True
    return Rows(tokens, documents, learned)


def seats(groups: Sequence[Group], n_lanes: int, rows: Sequence[int]) -> list[Seat]:
    """The seats of some rows of a global batch of `n_lanes` rows."""
    k = len(groups)
    return [Seat(row, groups[row % k], row // k, (n_lanes - row % k + k - 1) // k) for row in rows]


def open_lanes(
    lane: type[Lane], all_seats: Sequence[Seat], framing: Framing, seq_len: int, cursors: Sequence[Cursor] | None
) -> list[Lane]:
    """The lanes of a kind in some seats, those of one group sharing a reader."""
    if cursors is not None:
        check_cursors(cursors, all_seats)
    given: Sequence[Cursor | None] = cursors or [None] * len(all_seats)
    lanes = [lane(seat, framing, seq_len, cursor) for seat, cursor in zip(all_seats, given, strict=True)]
    by_group: dict[int, list[Lane]] = {}
    for opened in lanes:
        by_group.setdefault(opened.seat.group.k, []).append(opened)
    for together in by_group.values():
        seat = together[0].seat
        wanted = {one.seat.number: one.ordinal for one in together}
        reader = Reader(seat.group, seat.n_lanes, [one.place for one in together], wanted)
        for one in together:
            one.reader = reader
    return lanes


def lane_of(source: Source) -> type[Lane]:
    """What lanes make of the documents of a source."""
    return PairLane if source.config.holds_pairs else TextLane


def check_cursors(cursors: Sequence[Cursor], all_seats: Sequence[Seat]) -> None:
    """Raises ConfigError for cursors that are not those of these rows."""
    names = {"lane", *Place._fields, "document", "piece", "offset"}
    for cursor, seat in zip(cursors, all_seats, strict=True):
        sound = (
            isinstance(cursor, dict)
            and set(cursor) == names
            and all(type(n) is int and n >= 0 for n in cursor.values())
        )
        if not sound or cursor["lane"] != seat.row or cursor["document"] % seat.n_lanes != seat.number:
            raise ConfigError.at("checkpoint", f"its data cursor of batch row {seat.row} does not fit: {cursor!r}")
