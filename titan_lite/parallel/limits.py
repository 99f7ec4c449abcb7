"""Which layouts a job can have: degrees against the world size, and sizes that tensor parallelism has to cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING

from titan_lite.config.errors import CROSS_FIELD, NOT_AVAILABLE, NOT_HERE, Problem
from titan_lite.config.machine import has_cuda
from titan_lite.parallel.plan import DEGREE, divisors, split_problems

if TYPE_CHECKING:
    from titan_lite.job import Job

PROPOSALS = 3
"""How many layouts are named in the place of one that does not fit."""


def world_problem(degrees: Mapping[str, int], world_size: int) -> Problem:
    """What to say of degrees whose product is not the world size; -1, of one of them, is what the others leave."""
    given = {key: degree for key, degree in degrees.items() if degree not in (1, -1)}
    words = " x ".join(f"{key} {degree}" for key, degree in given.items())
    filled = -1 in degrees.values()
    why = f"{words} {'does not divide' if filled else 'is not'} the world size {world_size}"
    key = next(iter(given))
    return Problem(CROSS_FIELD, f".{key}", why, given[key], "; or ".join(nearest_layouts(given, world_size, filled)))


def nearest_layouts(given: Mapping[str, int], world_size: int, filled: bool) -> list[str]:
    """Degrees for the same axes that fit, those first that change the fewest of them, and these the least.

    `filled`: another axis takes what they leave.
    """
    parts = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found = []
    for degrees in product(parts, repeat=len(given)):
        size = math.prod(degrees)
        if size == world_size or (filled and world_size % size == 0):
            ratios = [abs(math.log(new / old)) for new, old in zip(degrees, given.values(), strict=True)]
            found.append((sum(ratio > 0 for ratio in ratios), sum(ratios), degrees))
    named = [dict(zip(given, degrees, strict=True)) for *_, degrees in sorted(found)[:PROPOSALS]]
    if "data_parallel_shard_degree" in given and world_size % math.prod(_others(given)) == 0:
        named.insert(0, dict(given) | {"data_parallel_shard_degree": -1})
    return [", ".join(f"{key} = {degree}" for key, degree in one.items()) for one in named[:PROPOSALS]]


def _others(given: Mapping[str, int]) -> list[int]:
    return [degree for key, degree in given.items() if key != "data_parallel_shard_degree"]


def tensor_problems(job: Job) -> Iterator[Problem]:
    """What stands between the job and its tensor-parallel degree, beside what tables of the model say themselves."""
    degree = job.parallelism.tensor_parallel_degree
    if degree == 1:
        return
    if job.parallelism.context_parallel_degree == 1:  # else `row_problems` looks at both
        yield from split_problems(job, "training.seq_len", job.training.seq_len)
    yield from _vocabulary(job, degree)
    if job.parallelism.enable_async_tensor_parallel:
        yield from _asynchronous(job)
    yield from _unplanned(job, degree)


def _vocabulary(job: Job, degree: int) -> Iterable[Problem]:
    size = job.model.vocab_size
    if size:
        yield from split_problems(job, "model.vocab_size", size)
    elif 64 % degree:
        why = "is split over tensor-parallel ranks; 0 is the tokenizer's size rounded up to a multiple of 64, which "
        why += f"{DEGREE} = {degree} need not divide"
        known = job.tokenizer.known_vocab_size
        such = f", such as {math.ceil(known / degree) * degree}" if known else ""
        allowed = f"a multiple of {degree}{such}, or {DEGREE} = {divisors(64)}"
        yield Problem(CROSS_FIELD, "model.vocab_size", why, size, allowed)


def _asynchronous(job: Job) -> Iterable[Problem]:
    key = "parallelism.enable_async_tensor_parallel"
    compiled = job.compile
    if not compiled.enable or "model" not in compiled.components or compiled.backend != "inductor":
        why = "is a pass of the compiler (inductor) over the model, and compile does not run it: "
        why += "compile.enable, compile.components, compile.backend"
        yield Problem(CROSS_FIELD, key, why, True, 'false, or compile.enable = true for "model" with "inductor"')
    elif not has_cuda():
        why = "writes into the memory of other CUDA devices, and there is none on this machine"
        yield Problem(NOT_HERE, key, why, True, "false")


def _unplanned(job: Job, degree: int) -> Iterable[Problem]:
    from titan_lite.models.spec import meta_model

    model = meta_model(job.model)
    if model is None:
        return
    from titan_lite.parallel.tensor import UnplannedError, styles

    try:
        styles(model)
    except UnplannedError as error:
        yield Problem(NOT_AVAILABLE, DEGREE, f"does not work with this model yet: {error}", degree, "1")
