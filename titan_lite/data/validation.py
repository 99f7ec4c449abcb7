"""Validation batches: documents that training never sees, each once, in canonical order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from titan_lite.data.background import Background, LoaderSettings
from titan_lite.data.batch import IGNORE, Batch
from titan_lite.data.config import DataConfig
from titan_lite.data.documents import Split
from titan_lite.data.lanes import lane_of, pair_rows
from titan_lite.data.pieces import Framing, piece_end
from titan_lite.data.source import Source
from titan_lite.data.tokenizer import Ids, Tokenizer

log = logging.getLogger(__name__)


class Settings(Protocol):
    """[validation]."""

    @property
    def seq_len(self) -> int: ...
    @property
    def local_batch_size(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def dataloader(self) -> LoaderSettings: ...
    def source(self) -> Source.Config | None:
        """None = the held-out split of the training source."""


Arrays = tuple[Ids, Ids, npt.NDArray[np.int32]]
"""tokens, targets, documents, all (R, T)."""


def validation_batches(
    data: DataConfig, validation: Settings, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """This data-parallel rank's rows of each global validation batch, the same number of batches on every rank.

    Reads the documents held out of `data.source`, or all of validation.dataset, from the start at each call. They are
    laid end to end and cut into rows, so every token but the very first is a target exactly once; the last batch is
    filled up with rows whose targets are IGNORE. `validation.steps`: at most that many batches; -1 = all. With
    `num_workers` > 0 one process loads ahead.
    """
    own_source = validation.source()
    if own_source is None:
        split = Split(data.source.build(), data.held_out, held_out=True)
    else:
        split = Split(own_source.build(key="validation.dataset"), 1.0, held_out=True)
    framing = Framing.of(tokenizer, data.bos)
    lane_of(split.source).require(split, framing, validation.seq_len)
    size, settings = validation.local_batch_size, validation.dataloader
    rows = range(dp_rank * size, (dp_rank + 1) * size)
    arrays = Background(Stream(split, framing, validation.seq_len, size * dp_size, rows, validation.steps), 1, settings)
    try:
        for tokens, targets, documents in arrays:
            batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents), cursors=[])
            yield batch.pin_memory() if settings.pin_memory and torch.cuda.is_available() else batch
    finally:
        arrays.close()


@dataclass(frozen=True)
class Stream:
    """The stream of this rank's arrays, opened by calling it."""

    split: Split
    framing: Framing
    seq_len: int
    lanes: int
    rows: range
    steps: int

    def __call__(self, part: int) -> Iterator[Arrays]:
        of_split = paired_rows if self.split.source.config.holds_pairs else text_rows
        rows = of_split(self.split, self.framing, self.seq_len)
        filler = filler_row(self.framing, self.seq_len)
        for step in count():
            together = list(islice(rows, self.lanes)) if step != self.steps else []
            if not together:
                return
            mine = [together[i] if i < len(together) else filler for i in self.rows]
            tokens, targets, documents = map(np.stack, zip(*mine, strict=True))
            yield tokens, targets, documents


def packed_rows(split: Split, framing: Framing, seq_len: int) -> Iterator[tuple[Ids, Ids]]:
    """(tokens, document numbers), both (T + 1,) or, for the last row, shorter.

    Each row begins with the last token of the one before.
    """
    tokens = documents = np.empty(0, dtype=np.int64)
    for number, ids in numbered_pieces(split, framing):
        tokens = np.concatenate((tokens, ids))
        documents = np.concatenate((documents, np.full(len(ids), number)))
        at = 0
        while len(tokens) - at > seq_len:
            yield tokens[at : at + seq_len + 1], documents[at : at + seq_len + 1]
            at += seq_len
        tokens, documents = tokens[at:], documents[at:]
    if len(tokens) > 1:
        yield tokens, documents


def numbered_pieces(split: Split, framing: Framing) -> Iterator[tuple[int, Ids]]:
    """(number of the document, tokens) piece by piece."""
    for number, text in enumerate(split.documents()):
        start = 0
        while start < len(text):
            end = piece_end(text, start)
            yield number, framing.encode(text, start, end)
            start = end


def text_rows(split: Split, framing: Framing, seq_len: int) -> Iterator[Arrays]:
    """`packed_rows`, of which the last one is filled up."""
    for ids, numbers in packed_rows(split, framing, seq_len):
        tokens, targets, documents = filler_row(framing, seq_len)
        n = len(ids) - 1
        tokens[:n], targets[:n] = ids[:-1], ids[1:]
        documents[:n] = numbers[:-1] - numbers[0]
        documents[n:] = documents[n - 1] + 1
        yield tokens, targets, documents


def paired_rows(split: Split, framing: Framing, seq_len: int) -> Iterator[Arrays]:
    """Each two are a pair, as `pair_rows` makes it; those that do not fit are left out, and told."""
    left_out = 0
    for text in split.documents():
        if (pair := pair_rows(text, framing, seq_len)) is None:
            left_out += 1
            continue
        assert pair.learned is not None
        targets = np.where(pair.learned, pair.tokens[:, 1:], IGNORE)
        yield from zip(pair.tokens[:, :-1], targets, pair.documents, strict=True)
    if left_out:
        log.warning("Validation left out %d pairs of more than validation.seq_len = %d tokens", left_out, seq_len)


def filler_row(framing: Framing, seq_len: int) -> Arrays:
    """A row for which no loss is computed, as a document that is not the first."""
    tokens = np.full(seq_len, framing.tokenizer.eos_id, dtype=np.int64)
    return tokens, np.full(seq_len, IGNORE, dtype=np.int64), np.ones(seq_len, dtype=np.int32)
