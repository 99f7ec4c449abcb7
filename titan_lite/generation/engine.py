"""A model as it is decoded from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_lite.generation.cache import KVCache
from titan_lite.models.head.output import Output
from titan_lite.models.memory.decoding import Decoding
from titan_lite.models.mtp import nothing_further
from titan_lite.models.mtp.drafts import Further
from titan_lite.models.transformer import Transformer


def alone(decision: Any) -> Any:
    """What a process decides that shares its model with no other."""
    return decision


def no_memory() -> None:
    """A text remembers all of itself."""


def last_logits(x: Tensor, output: Output, n: int = 1) -> Tensor:
    """The `Consume` of decoding: logits (B, n, V) of the last positions only."""
    return output.logits(x[:, -n:])


@dataclass(frozen=True)
class Engine:
    """A model with what all texts that it continues have in common."""

    model: Transformer
    device: torch.device
    vocab_size: int
    """The tokenizer's: the model's own may have been rounded up, and no token behind it is ever chosen."""
    ends: frozenset[int] = frozenset()
    """Tokens that end a text and are no part of it."""
    agree: Callable[[Any], Any] = alone
    """Makes one decision of those of all ranks that share the model: they must go on with the same tokens."""
    new_memory: Callable[[], Decoding | None] = no_memory
    """What a text remembers that is read in the segments of the model's training; None = all of itself."""

    @property
    def one_by_one(self) -> bool:
        """Whether texts cannot share calls: what a token makes depends on what is read with it, or on segments."""
        model = self.model
        return model.stack.exits_early or model.positions_move or self.new_memory is not no_memory

    def read(
        self, tokens: Tensor, cache: KVCache | Decoding, n: int = 1, further: Further = nothing_further
    ) -> tuple[Tensor, int]:
        """Logits (B, n, vocab_size) behind the last n of the tokens (B, T), and how many tokens the last call had.

        Those of the last call are for the caller to count as seen (`cache.advance`). A cache of segments has room for
        some of the tokens only, and there are several calls.
        """
        consume = partial(last_logits, n=n)
        # Decoding changes shapes with every token: compiled blocks run eagerly here.
        with torch.compiler.set_stance("force_eager"):
            while True:
                piece, tokens = tokens[:, : cache.room], tokens[:, cache.room :]
                logits = self.model(piece, memory=cache, consume=consume, agree=self.agree, further=further)
                if not tokens.shape[1]:
                    return logits[..., : self.vocab_size], piece.shape[1]
                cache.advance(piece.shape[1])
