"""The layouts that a number of devices allows, from the simplest on, and the micro-batches for each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import product

from estimation.question import CONTEXT, EXPERT, PIPELINE, TENSOR, Changes, Question, value_at
from titan_lite.config.errors import ConfigError
from titan_lite.job import Job

REPLICATE = "parallelism.data_parallel_replicate_degree"
SHARD = "parallelism.data_parallel_shard_degree"
LOCAL_BATCH = "training.local_batch_size"
DOUBLINGS = 3
"""How far beyond the job's own micro-batch larger ones are tried where no global batch is given."""
DEGREES = (REPLICATE, TENSOR, CONTEXT, PIPELINE, EXPERT)
"""Those that are tried. Shards take the ranks that the others leave; experts are spread over ranks counted already."""


class Layouts:
    """The layouts of a question that the config check has nothing against."""

    def __init__(self, question: Question, own: Job, fixed: frozenset[str]):
        """`fixed`: keys that keep their value in the job as given, `own`."""
        self.question, self.own = question, own
        self.size = question.world_size
        self.fixed = {key: value_at(own, key) for key in fixed}
        self.refused: Counter[str] = Counter()
        """Why -> how many."""

    def __iter__(self) -> Iterator[Changes]:
        """Legal ones: of those that split a sequence's work over fewer ranks first, then of fewer replicas."""
        axes = [self._degrees(key) for key in DEGREES]
        found = [degrees for degrees in product(*axes) if self.size % math.prod(degrees[:-1]) == 0]
        for degrees in sorted(found, key=lambda one: (math.prod(one[1:]), [-n for n in one[1:]], one[0])):
            layout = dict(zip(DEGREES, degrees, strict=True)) | {SHARD: -1}
            layout = {key: value for key, value in layout.items() if key not in self.fixed}
            refusals = [self._refusal({**layout, **batch}) for batch in self.batches(layout)]
            if None in refusals:
                yield layout
            else:
                self._count(refusals[0])

    def batches(self, layout: Changes) -> list[Changes]:
        """Sequences of a micro-batch, fewest first: the job's own number, halves and doubles of it.

        Up to all of a rank's share of the global batch, where the job gives one, and divisors of it.
        """
        training = self.own.training
        own = training.local_batch_size
        if LOCAL_BATCH in self.fixed:
            return [{}]
        ranks = math.prod(layout.get(key, self.fixed.get(key, 1)) for key in (TENSOR, CONTEXT, PIPELINE))
        share = training.global_batch_size * ranks // self.size
        if training.global_batch_size == -1:
            odd = own // (own & -own)
            sizes = [odd * 2**k for k in range(own.bit_length() + DOUBLINGS) if odd * 2**k <= own * 2**DOUBLINGS]
        else:
            sizes = sorted({own, *(2**k for k in range(share.bit_length()))})
            sizes = [size for size in sizes if share and share % size == 0] or [own]
        return [{LOCAL_BATCH: size} for size in sizes]

    def _degrees(self, key: str) -> list[int]:
        """Degrees worth a look; none beyond 1 where all of them are refused for what they are."""
        if key in self.fixed:
            return [self.fixed[key]]
        divisors = [n for n in range(1, self.size + 1) if self.size % n == 0]
        if key == REPLICATE:
            return divisors
        if key == TENSOR:
            node = self.question.device.per_node
            for _ in (n for n in divisors if n > node):
                self._count(f"{key}: over more than the {node} devices of a node is not tried")
            divisors = [n for n in divisors if n <= node]
        refusals = [self._refusal({key: n, SHARD: -1}, key) for n in divisors[1:]]
        if None in refusals:
            return divisors
        for why in refusals:
            self._count(why)
        return [1]

    def _count(self, why: str | None) -> None:
        if why is not None:
            self.refused[why] += 1

    def _refusal(self, layout: Changes, about: str = "") -> str | None:
        """Why the config check refuses a layout (for its key `about`, where one is given); None where it does not."""
        layout = {key: value for key, value in layout.items() if key not in self.fixed}
        try:
            self.question.job(layout)
        except ConfigError as error:
            problems = [problem for problem in error.problems if about in ("", problem.key)]
            return f"{problems[0].key}: {problems[0].why}" if problems else None
        return None
