"""Many texts at once, a token of each per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from titan_lite.generation.cache import KVCache
from titan_lite.generation.engine import Engine
from titan_lite.generation.sampling import Sampling
from titan_lite.models.memory.decoding import Decoding


class Request(NamedTuple):
    """A text that is to be continued."""

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    """What is drawn depends on it alone: neither on the texts beside this one, nor on its place among them."""


@dataclass
class Row:
    """A text that grows."""

    number: int
    """Its place among the requests."""
    tokens: list[int]
    left: int
    """Tokens that may still come."""
    generator: torch.Generator


def never(row: int, token: int) -> bool:
    """No text ends before its time."""
    return False


def decode(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, stop: Callable[[int, int], bool] = never
) -> Iterator[tuple[int, int]]:
    """Yields (number of the request, its next token) until all texts have ended, which each does as if it were alone.

    A text ends at its `max_new_tokens`, before a token of `engine.ends`, or after one of which `stop` says so. Texts
    begin side by side at position 0, and a call reads as many tokens as all of them have: there is no padding that a
    model would have to look past. Those with longer prompts go on reading while others are continued already, and one
    that has ended takes up no room any more.
    """
    rows = [
        Row(number, list(request.prompt), request.max_new_tokens, torch.Generator().manual_seed(request.seed))
        for number, request in enumerate(requests)
    ]
    for group in [[row] for row in rows] if engine.one_by_one else [rows]:
        yield from _together(engine, group, sampling, stop)


@torch.no_grad()
def _together(
    engine: Engine, rows: list[Row], sampling: Sampling, stop: Callable[[int, int], bool]
) -> Iterator[tuple[int, int]]:
    sampler = sampling.sampler()
    cache: KVCache | Decoding | None = engine.new_memory()
    if cache is None:
        cache = KVCache(max(len(row.tokens) + row.left for row in rows))
    read = 0
    while rows:
        until = min(len(row.tokens) for row in rows)
        piece = torch.tensor([row.tokens[read:until] for row in rows], device=engine.device)  # (B, T)
        logits, last = engine.read(piece, cache)
        cache.advance(last)
        read = until
        due = [index for index, row in enumerate(rows) if len(row.tokens) == read]
        texts, generators = [rows[index].tokens for index in due], [rows[index].generator for index in due]
        of_due = logits[:, -1] if len(due) == len(rows) else logits[due, -1]
        ended = set()
        for index, token in zip(due, engine.agree(sampler(of_due, texts, generators)), strict=True):
            row = rows[index]
            if token in engine.ends:
                ended.add(index)
                continue
            row.tokens.append(token)
            row.left -= 1
            yield row.number, token
            if stop(row.number, token) or not row.left:  # it is told of every token
                ended.add(index)
        if ended:
            staying = [index for index in range(len(rows)) if index not in ended]
            rows = [rows[index] for index in staying]
            if rows:
                assert isinstance(cache, KVCache), "a text with a memory has no others beside it"
                cache.select(staying)
