"""The loss of each token of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.evaluation.windows import Window, windows
from titan_lite.models.head.output import Output
from titan_lite.models.memory import LaneMemory
from titan_lite.models.transformer import Transformer
from titan_lite.pretrained import Pretrained

CHUNK = 256
"""Positions whose logits exist at once."""


class Scores(NamedTuple):
    """Of the tokens 1 .. n - 1 of a text of n, each given all or some of those before it."""

    losses: Tensor
    """(n - 1,) float64, -log p in nats."""
    likeliest: Tensor
    """(n - 1,) bool: no other token is likelier."""


class Scorer(Protocol):
    """Texts -> their scores, in order, as they are done."""

    def __call__(self, texts: Iterable[Sequence[int]]) -> Iterator[Scores]: ...


def token_scores(x: Tensor, output: Output, targets: Tensor) -> Tensor:
    """A `Consume`: for the last positions, as many as there are targets (B, T), losses and 1 where the target is the
    likeliest token: (2, B, T) float32."""
    x = x[:, x.shape[1] - targets.shape[1] :]
    losses, likeliest = [], []
    for part, wanted in zip(x.split(CHUNK, dim=1), targets.split(CHUNK, dim=1), strict=True):
        logits = output.logits(part).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape))
        likeliest.append((logits.argmax(-1) == wanted).float())
    return torch.stack((torch.cat(losses, dim=1), torch.cat(likeliest, dim=1)))


@dataclass
class _Text:
    """A text that is being scored."""

    ids: Sequence[int]
    scores: Scores
    waiting: int
    """Windows that are still to be read."""


@dataclass
class WindowScorer:
    """Reads windows of `size` tokens, `batch_size` at a time, of one text after the other.

    Shorter ones are padded on the right, where nothing that is scored looks.
    """

    model: Transformer
    device: torch.device
    size: int
    stride: int
    batch_size: int
    _batch: list[tuple[_Text, Window]] = field(default_factory=list)

    def __call__(self, texts: Iterable[Sequence[int]]) -> Iterator[Scores]:
        open_texts: list[_Text] = []
        for ids in texts:
            found = list(windows(len(ids), self.size, self.stride))
            n = len(ids) - 1
            scores = Scores(torch.empty(n, dtype=torch.float64), torch.empty(n, dtype=torch.bool))
            text = _Text(ids, scores, len(found))
            open_texts.append(text)
            for window in found:
                if self._batch and not self._fits(window):
                    self._read()
                self._batch.append((text, window))
                if len(self._batch) == self.batch_size:
                    self._read()
            while open_texts and not open_texts[0].waiting:
                yield open_texts.pop(0).scores
        self._read()
        yield from (text.scores for text in open_texts)

    def _fits(self, window: Window) -> bool:
        """With positions that change with the length of what is read, only windows of one length go together."""
        other = self._batch[0][1]
        return not self.model.positions_move or window.stop - window.start == other.stop - other.start

    @torch.no_grad()
    def _read(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        longest = max(window.stop - window.start - 1 for _, window in batch)
        rows = torch.zeros(len(batch), longest + 1, dtype=torch.int64)
        for row, (text, window) in zip(rows, batch, strict=True):
            row[: window.stop - window.start] = torch.tensor(text.ids[window.start : window.stop])
        first = min(window.first - window.start for _, window in batch)
        rows = rows.to(self.device)
        consume = partial(token_scores, targets=rows[:, first:])
        losses, likeliest = self.model(rows[:, :-1], consume=consume).cpu()
        for row, (text, window) in enumerate(batch):
            there = slice(window.first - window.start - first, window.stop - window.start - first)
            here = slice(window.first - 1, window.stop - 1)
            text.scores.losses[here] = losses[row, there].double()
            text.scores.likeliest[here] = likeliest[row, there].bool()
            text.waiting -= 1


@dataclass(frozen=True)
class MemoryScorer:
    """Reads each text once, in segments of `seq_len` tokens, which see of those before what the memory keeps."""

    model: Transformer
    device: torch.device
    memory: LaneMemory
    seq_len: int

    @torch.no_grad()
    def __call__(self, texts: Iterable[Sequence[int]]) -> Iterator[Scores]:
        for ids in texts:
            n = len(ids) - 1
            tokens = torch.tensor([list(ids)], device=self.device)
            # What a memory keeps are whole segments; nothing that is scored sees what fills up the last one.
            tokens = F.pad(tokens, (0, -n % self.seq_len))
            documents = torch.zeros_like(tokens[:, 1:], dtype=torch.int32)
            pieces = self.memory.reading(tokens[:, :-1], tokens[:, 1:], documents, self.seq_len)
            found = [
                self.model(
                    piece.tokens,
                    piece.documents,
                    memory=piece.memory,
                    consume=partial(token_scores, targets=piece.targets),
                ).cpu()
                for piece in pieces
            ]
            losses, likeliest = torch.cat(found, dim=2)[:, 0, :n]
            yield Scores(losses.double(), likeliest.bool())


def scorer(loaded: Pretrained, size: int, stride: int, batch_size: int) -> Scorer:
    """What scores texts with this model; one with a memory reads them once, in segments of `size` tokens."""
    if loaded.remembers():
        return MemoryScorer(loaded.model, loaded.device, loaded.memory(), size)
    return WindowScorer(loaded.model, loaded.device, size, stride, batch_size)
