"""Times that candidates of a plan cannot go below, by what others take: those that are slow need no estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from estimation.question import Changes, Outcome, Question
from titan_lite.parallel.pipeline.plan import job_table
from titan_lite.parallel.pipeline.schedule import timeline

CERTAIN = 3
"""Where so many that fit are known to be faster, a candidate is not estimated."""

Degrees = tuple[int, ...]
"""Over how many ranks one sequence's work is spread, axis by axis."""


@dataclass
class Floors:
    """What is known so far, in seconds per token of all devices together."""

    computing: dict[int, float] = field(default_factory=dict)
    """Mode -> what its tokens take to compute, whatever the layout: work that is split becomes no less."""
    waiting: list[tuple[int, Degrees, float]] = field(default_factory=list)
    """(mode, degrees, what ranks wait for each other): no less over more ranks, or with more to recompute."""
    best: list[float] = field(default_factory=list)
    """Of what fits, fastest first."""

    def learn(self, mode: int, degrees: Degrees, outcome: Outcome) -> None:
        """What one estimate tells about others."""
        self.waiting.append((mode, degrees, outcome.exposed * outcome.seconds_per_token))
        self.learn_of(outcome)

    def learn_of(self, outcome: Outcome) -> None:
        """That this is how fast one candidate is, if it fits."""
        if outcome.fits:
            self.best = sorted((*self.best, outcome.seconds_per_token))[:CERTAIN]

    def learn_computing(self, known: Mapping[tuple[int, int], Outcome]) -> None:
        """From one layout's outcomes by (mode, micro-batch).

        What grows with the micro-batch is the tokens' own: an operation takes the longer of its FLOPs and of its bytes,
        of which weights take the same in any batch, so that the step from one batch to the next is never more than
        tokens take in any other.
        """
        for mode in sorted({mode for mode, _ in known}):
            seconds = sorted((size, _computing(outcome)) for (its, size), outcome in known.items() if its == mode)
            steps = [(b * of_b - a * of_a) / (b - a) for (a, of_a), (b, of_b) in pairwise(seconds)]
            if steps:
                self.computing[mode] = max(0.0, steps[0])

    @property
    def full(self) -> bool:
        """Whether enough is known to rule anything out."""
        return len(self.best) == CERTAIN and bool(self.computing)

    def rule_out(self, mode: int, degrees: Degrees, bubble: float) -> bool:
        """Whether a candidate is slower than `CERTAIN` that fit, whatever its micro-batch."""
        if not self.full:
            return False
        computing = self.computing.get(mode, min(self.computing.values()))
        known = (
            seconds
            for its, its_degrees, seconds in self.waiting
            if its in (0, mode) and all(a <= b for a, b in zip(its_degrees, degrees, strict=True))
        )
        return computing / (1 - bubble) + max(known, default=0.0) > self.best[-1]


def _computing(outcome: Outcome) -> float:
    return outcome.computing * outcome.seconds_per_token


def bubble_of(question: Question, changes: Changes) -> float:
    """The share of a step in which pipeline ranks wait for each other, stages being alike."""
    job = question.job(changes)
    return timeline(job_table(job)).bubble if job.parallelism.pipeline_parallel_degree > 1 else 0.0
