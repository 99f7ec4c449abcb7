"""Self-speculative decoding: the model's `mtp` guesses what comes behind the next token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from titan_lite.generation.cache import KVCache
from titan_lite.generation.decode import Request
from titan_lite.generation.engine import Engine
from titan_lite.generation.sampling import Sampling


@torch.no_grad()
def speculate(engine: Engine, request: Request, sampling: Sampling) -> Iterator[int]:
    """The tokens that `decode` gives of one request, but for logits that are equal up to rounding.

    Guesses go through the model along with the next token, and where one is what would have been drawn, its forward is
    saved. Only for texts that can share calls (`engine.one_by_one`): with others, what a token makes depends on what
    goes through the model with it. Source: arXiv 1811.03115.
    """
    sampler, generator = sampling.sampler(), torch.Generator().manual_seed(request.seed)
    text, left = list(request.prompt), request.max_new_tokens
    new_cache = partial(KVCache, len(text) + left)
    cache, drafts = new_cache(), engine.model.mtp.drafts(engine.model, engine.vocab_size, text, new_cache)
    tokens, guesses = list(text), list[int]()
    while left:
        both = torch.tensor([tokens + guesses], device=engine.device)  # (1, T)
        logits, last = engine.read(both, cache, n=1 + len(guesses), further=drafts.see)
        said: list[int] = []
        for of_next, guess in zip(logits[0], [*guesses, None], strict=True):
            said += engine.agree(sampler(of_next[None], [text], [generator]))
            if said[-1] in engine.ends:
                return
            text.append(said[-1])
            yield said[-1]
            if said[-1] != guess:
                break
        kept, left = len(tokens) + len(said) - 1, left - len(said)
        cache.advance(last - len(guesses) + len(said) - 1)
        # The last token that may be drawn goes through no forward.
        with torch.compiler.set_stance("force_eager"):
            guesses = [engine.agree(guess) for guess in drafts.guess(kept, said, most=left - 1)] if left else []
        tokens = said[-1:]
