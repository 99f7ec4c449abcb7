"""One prompt, as most callers have it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from titan_lite.generation.decode import Request, decode
from titan_lite.generation.engine import Engine, alone, no_memory
from titan_lite.generation.sampling import Sampling
from titan_lite.generation.speculate import speculate
from titan_lite.models.memory.decoding import Decoding
from titan_lite.models.transformer import Transformer


def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    device: torch.device,
    vocab_size: int,
    ends: Collection[int] = (),
    agree: Callable[[Any], Any] = alone,
    memory: Decoding | None = None,
    ahead: bool = False,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` sampled tokens, up to but without one of `ends`. Same arguments, same tokens.

    With a `memory` the text is read in its segments, which see of those before what it shows them. `ahead` lets the
    model's `mtp` guess: see `speculate`. For the other arguments see `Engine`.
    """
    assert memory is None or not ahead, "a memory's segments end where the text does"
    engine = Engine(model, device, vocab_size, frozenset(ends), agree, no_memory if memory is None else lambda: memory)
    request = Request(prompt, max_new_tokens, seed)
    if ahead:
        return speculate(engine, request, sampling)
    return (token for _, token in decode(engine, [request], sampling))
