"""Beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titan_lite.generation.cache import KVCache
from titan_lite.generation.engine import Engine
from titan_lite.generation.sampling import Sampling, wide


class Beam(NamedTuple):
    """A continuation."""

    score: float
    """log p of its tokens; once it has ended, divided by their number ** length_penalty."""
    tokens: tuple[int, ...]
    ended: bool = False


@dataclass(frozen=True)
class BeamSearch:
    """The likeliest continuation among those that `width` beams find.

    In each step all one-token continuations of all beams compete. Of the best `width`, those that end are kept as
    results; the best that do not are the next beams. The search is over where the best beam, its score divided by its
    present length ** length_penalty, is behind the worst of `width` results. Source: arXiv 1609.08144, section 7,
    without its coverage penalty; the rules, ties included, are those of transformers' generate(num_beams=width).
    """

    width: int
    length_penalty: float = 1.0
    """Above 0 longer continuations are favoured, below 0 shorter ones."""

    @torch.no_grad()
    def __call__(self, engine: Engine, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling) -> list[int]:
        """Its tokens, without the one that ends it. Of `sampling`, steps act that are not for drawing alone."""
        steps = [step for step in sampling.steps() if not step.for_drawing]
        cache = KVCache(len(prompt) + max_new_tokens)
        beams, results = [Beam(0.0, ())], list[Beam]()
        tokens = torch.tensor([list(prompt)], device=engine.device)
        for length in range(1, max_new_tokens + 1):
            logits, last = engine.read(tokens, cache)
            cache.advance(last)
            scores = wide(logits[:, -1]).log_softmax(-1)  # (beams, V)
            for step in steps:
                scores = step(scores, [[*prompt, *beam.tokens] for beam in beams])
            totals = scores + torch.tensor([[beam.score] for beam in beams], dtype=scores.dtype)
            parents, candidates = self._candidates(engine, beams, totals)
            final = length == max_new_tokens
            results = self._results(results, candidates, length, final)
            going = [index for index, beam in enumerate(candidates) if not beam.ended][: self.width]
            beams = [candidates[index] for index in going]
            if final or not beams or self._is_over(beams[0], results, length):
                break
            cache.select([parents[index] for index in going])
            tokens = torch.tensor([beam.tokens[-1:] for beam in beams], device=engine.device)
        best = results[0].tokens
        return list(best[:-1] if best[-1] in engine.ends else best)

    def _candidates(self, engine: Engine, beams: list[Beam], totals: Tensor) -> tuple[list[int], list[Beam]]:
        """The best continuations by a token, best first, and the number of the beam that each continues.

        So many that `width` are left where others end.
        """
        count = min((1 + max(1, len(engine.ends))) * self.width, totals.numel())
        values, places = totals.flatten().topk(count)
        found = zip(values.tolist(), places.tolist(), strict=True)
        found = engine.agree([(value, *divmod(place, totals.shape[1])) for value, place in found])
        parents = [parent for _, parent, _ in found]
        made = [Beam(value, (*beams[parent].tokens, token), token in engine.ends) for value, parent, token in found]
        return parents, made

    def _results(self, results: list[Beam], candidates: list[Beam], length: int, final: bool) -> list[Beam]:
        """The best `width` that have ended, best first; in the end, beams have."""
        new = [beam for beam in candidates[: self.width] if beam.ended or final]
        scored = [beam._replace(score=beam.score / length**self.length_penalty) for beam in new]
        return sorted(results + scored, key=lambda beam: -beam.score)[: self.width]

    def _is_over(self, best: Beam, results: list[Beam], length: int) -> bool:
        full = len(results) == self.width
        return full and best.score / length**self.length_penalty <= results[-1].score
