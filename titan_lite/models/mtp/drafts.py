"""Self-speculative decoding: guesses at the tokens behind the next one, which the model then checks in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from titan_lite.models.context import Context, Memory
from titan_lite.models.head.lm import all_logits
from titan_lite.models.stack import Streams

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer

Further: TypeAlias = Callable[[Tensor, Streams, Callable[[Tensor], Tensor], Context], Sequence[Tensor]]
"""(embedded tokens, what the stack made, the final norm, context) -> states for the head beside the last ones."""


Read: TypeAlias = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(the stream (B, T, D), the norm between it and the head) -> what the next module reads of it."""


def nothing_further(*_: Any) -> Sequence[Tensor]:
    """Only the next token."""
    return ()


class Cache(Memory, Protocol):
    """A memory that counts what it is to keep."""

    def advance(self, tokens: int) -> None:
        """Keeps the last call's first `tokens` tokens, beside what was kept before."""
        raise NotImplementedError


class Drafts:
    """The guesses for one text: `see` goes along with each forward over it, `guess` tells what comes next."""

    def see(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        """A `Further`: takes what it needs from a forward, and asks for nothing."""
        return ()

    def guess(self, kept: int, said: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens behind the last of `said`, which are those since the last call. Of the forward's
        tokens, the first `kept` stand.
        """
        return []


NO_DRAFTS = Drafts()
"""One token after the other."""


def likeliest(model: Transformer, state: Tensor, vocab_size: int) -> int:
    """The token for a state (1, D) behind the norm."""
    logits: Tensor = model.head(state[:, None], model.embedding, all_logits)
    return int(logits[0, 0, :vocab_size].argmax())


class HeadDrafts(Drafts):
    """All guesses from the last position, by heads side by side. Their keys are in the model's own cache."""

    def __init__(self, model: Transformer, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
        self.states: Sequence[Tensor] = ()

    def see(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        self.states = self.model.mtp(embedded, streams, norm, context)
        return ()

    def guess(self, kept: int, said: Sequence[int], most: int) -> list[int]:
        return [likeliest(self.model, state[:, kept - 1], self.vocab_size) for state in self.states[:most]]


class ModuleDrafts(Drafts):
    """One guess after the other, each read by the next module.

    A module's keys and states stand for good only where the token k ahead of them does; the others are made anew.
    """

    def __init__(
        self,
        model: Transformer,
        vocab_size: int,
        prompt: Sequence[int],
        new_cache: Callable[[], Cache],
        read: Read,
    ):
        self.model, self.vocab_size, self.read = model, vocab_size, read
        self.tokens = list(prompt)
        self.caches = [new_cache() for _ in range(model.mtp.depth)]
        self.states: list[Tensor | None] = [None] * (1 + model.mtp.depth)
        """What the next module reads of the stack and of each module, (1, n, D): those that stand."""
        self.seen: Tensor | None = None

    def see(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        self.seen = self.read(streams.x, norm)
        return ()

    def guess(self, kept: int, said: Sequence[int], most: int) -> list[int]:
        assert self.seen is not None, "a guess follows a forward"
        self.tokens += said
        z = self.states[0] = joined(self.states[0], self.seen[:, :kept])  # of all tokens but the last
        guesses: list[int] = []
        for k, cache in enumerate(self.caches[:most], 1):
            start = cache.length
            new, state = self._module(k, z[:, start:], [*self.tokens, *guesses][start + k :], cache)
            z = joined(self.states[k], new)
            standing = max(0, len(self.tokens) - k)
            self.states[k] = z[:, :standing]
            cache.advance(standing - start)
            guesses.append(likeliest(self.model, state[:, -1], self.vocab_size))
        return guesses

    def _module(self, k: int, z: Tensor, ahead: Sequence[int], cache: Cache) -> tuple[Tensor, Tensor]:
        """The k-th module over the positions from cache.length on, whose tokens k ahead are `ahead`."""
        tokens = torch.tensor([list(ahead)], device=z.device)
        context = self.model.context(tokens, memory=cache)
        ahead_of_them = context._replace(positions=context.positions + k, stream_positions=None)
        embedded = self.model.embedding(tokens, ahead_of_them)
        made: tuple[Tensor, Tensor] = self.model.mtp.predictors[str(k)](z, embedded, context.layer(-1 - k, {}))
        return made


def joined(before: Tensor | None, x: Tensor) -> Tensor:
    """Positions behind those there are, (1, n, D)."""
    return x if before is None else torch.cat((before, x), dim=1)
