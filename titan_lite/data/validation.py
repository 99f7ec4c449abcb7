"""Validation batches: documents that training never sees, each once, in canonical order."""

from __future__ import annotations

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
from titan_lite.data.pieces import Framing, piece_end
from titan_lite.data.source import Source
from titan_lite.data.tokenizer import Ids, Tokenizer


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
    split.require_documents()
    size, settings = validation.local_batch_size, validation.dataloader
    rows = range(dp_rank * size, (dp_rank + 1) * size)
    framing = Framing.of(tokenizer, data.bos)
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
        packed = packed_rows(self.split, self.framing, self.seq_len)
        for step in count():
            together = list(islice(packed, self.lanes)) if step != self.steps else []
            if not together:
                return
            mine = [together[i] if i < len(together) else None for i in self.rows]
            yield to_arrays(mine, self.seq_len, self.framing.tokenizer.eos_id)


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


def to_arrays(rows: list[tuple[Ids, Ids] | None], seq_len: int, filler: int) -> Arrays:
    """Rows as arrays; what is missing is `filler`, for which no loss is computed, as a document of its own."""
    tokens = np.full((len(rows), seq_len), filler, dtype=np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, dtype=np.int64)
    documents = np.zeros((len(rows), seq_len), dtype=np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            ids, numbers = row
            n = len(ids) - 1
            tokens[i, :n], targets[i, :n] = ids[:-1], ids[1:]
            documents[i, :n] = numbers[:-1] - numbers[0]
            documents[i, n:] = documents[i, n - 1] + 1
    return tokens, targets, documents
