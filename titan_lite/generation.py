"""Sampling text from a model, one token at a time with cached keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titan_lite.models.context import LayerMemory, Memory
from titan_lite.models.head.output import Output
from titan_lite.models.memory.decoding import Decoding
from titan_lite.models.mtp import NO_DRAFTS
from titan_lite.models.transformer import Transformer


class LayerCache(LayerMemory):
    """One layer's keys and values, (B, G, capacity, Dh), filled up to `cache.length`."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.k = self.v = torch.empty(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes behind what is there and returns everything written so far."""
        if not self.k.numel():
            self.k = k.new_empty(*k.shape[:2], self.cache.capacity, k.shape[3])
            self.v = v.new_empty(*v.shape[:2], self.cache.capacity, v.shape[3])
        start, stop = self.cache.length, self.cache.length + k.shape[2]
        assert stop <= self.cache.capacity, f"{stop} tokens in a cache for {self.cache.capacity}"
        self.k[:, :, start:stop], self.v[:, :, start:stop] = k, v
        return self.k[:, :, :stop], self.v[:, :, :stop]

    def take(self, other: LayerCache, tokens: int) -> None:
        """Writes what this call's `tokens` tokens have written into `other`."""
        written = slice(self.cache.length, self.cache.length + tokens)
        self.extend(other.k[:, :, written], other.v[:, :, written])


class KVCache(Memory):
    """Keys and values of every executed layer, for up to `capacity` tokens."""

    grows = True

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        return self.layers.setdefault(index, LayerCache(self))

    @property
    def room(self) -> int:
        """Tokens that the next call may have."""
        return self.capacity - self.length

    def advance(self, tokens: int) -> None:
        """Counts `tokens` as seen; call after each forward."""
        self.length += tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 = the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest; 0 = all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability, the one that reaches it included."""

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Next token from logits (V,). Raises FloatingPointError where a logit is not a number or infinite."""
        logits = logits.cpu().double()  # a GPU's cumsum is not deterministic
        if not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        if self.temperature == 0:
            return int(logits.argmax())
        values, tokens = torch.sort(logits, descending=True, stable=True)
        values = (values - values[0]) / self.temperature  # the largest is 0: no temperature is too small
        if self.top_k:
            values, tokens = values[: self.top_k], tokens[: self.top_k]
        probabilities = values.softmax(-1)
        if self.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def last_logits(x: Tensor, output: Output, n: int = 1) -> Tensor:
    """The `Consume` of decoding: logits (B, n, V) of the last positions only."""
    return output.logits(x[:, -n:])


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    device: torch.device,
    vocab_size: int,
    end: int | None = None,
    agree: Callable[[int], int] = int,
    memory: Decoding | None = None,
    ahead: bool = False,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` sampled tokens, up to but without `end`. Same arguments, same tokens.

    Tokens are below `vocab_size`, the tokenizer's: the model's own may have been rounded up. Ranks that share a sharded
    model must go on with the same token, after the same iterations: `agree` makes one of theirs. With a `memory` the
    text is read in its segments, which see of those before what it shows them.

    `ahead` lets the model's `mtp` guess what comes behind the next token: guesses go through the model along with it,
    and where one is what would have been drawn, its forward is saved. The tokens are the same, but for logits that are
    equal up to rounding. Not for a stack that exits early, nor positions that depend on the length of the text: with
    those, what a token makes depends on what goes through the model with it; nor with a `memory`.
    Source: arXiv 1811.03115.
    """
    assert memory is None or not ahead, "a memory's segments end where the text does"
    generator = torch.Generator().manual_seed(seed)
    new_cache = partial(KVCache, len(prompt) + max_new_tokens)
    cache: KVCache | Decoding = new_cache() if memory is None else memory
    drafts = NO_DRAFTS
    if ahead:
        drafts = model.mtp.drafts(model, vocab_size, prompt, new_cache)
    tokens, guesses, left = list(prompt), list[int](), max_new_tokens
    # Decoding changes shapes with every token: compiled blocks run eagerly here.
    eager = partial(torch.compiler.set_stance, "force_eager")
    while left:
        both = torch.tensor([tokens + guesses], device=device)  # (1, T)
        consume = partial(last_logits, n=1 + len(guesses))
        with eager():
            while both.shape[1]:
                piece, both = both[:, : cache.room], both[:, cache.room :]
                logits = model(piece, memory=cache, consume=consume, agree=agree, further=drafts.see)
                if both.shape[1]:
                    cache.advance(piece.shape[1])
        said: list[int] = []
        for of_next, guess in zip(logits[0, :, :vocab_size], [*guesses, None], strict=True):
            said.append(agree(sampling.draw(of_next, generator)))
            if said[-1] == end:
                return
            yield said[-1]
            if said[-1] != guess:
                break
        kept, left = len(tokens) + len(said) - 1, left - len(said)
        cache.advance(piece.shape[1] - len(guesses) + len(said) - 1)
        with eager():
            # The last token that may be drawn goes through no forward.
            guesses = [agree(guess) for guess in drafts.guess(kept, said, most=left - 1)] if left else []
        tokens = said[-1:]
