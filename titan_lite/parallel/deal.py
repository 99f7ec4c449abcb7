"""How a row's tokens are dealt to context-parallel ranks, and what does not go with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.parallel.plan import DEGREE, degree, nearest

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.attention.heads import HeadAttention

CONTEXT = "parallelism.context_parallel_degree"
METHOD = "parallelism.context_parallel_method"
MOST = 64
"""Largest degree that is proposed."""

LoadBalancer: TypeAlias = Literal["headtail", "none"]
RotateMethod: TypeAlias = Literal["allgather", "alltoall"]


def head_and_tail(rank: int, size: int) -> tuple[int, ...]:
    """Of 2 * size chunks one from the front and one from the back: a causal mask leaves all ranks as many scores."""
    return rank, 2 * size - 1 - rank


def in_a_row(rank: int, size: int) -> tuple[int, ...]:
    """Of `size` chunks the next one: under a causal mask the last rank has the most to do."""
    return (rank,)


DEALS: dict[LoadBalancer, Callable[[int, int], tuple[int, ...]]] = {"headtail": head_and_tail, "none": in_a_row}
"""From a rank and the number of ranks to the numbers of its chunks of a row, which ascend."""


def sharers(job: Job) -> int:
    """Ranks over which each row's tokens are split by context parallelism."""
    return job.parallelism.context_parallel_degree


def takes_rings(job: Job) -> bool:
    """Whether keys and values of other ranks come to a rank's queries."""
    return sharers(job) > 1 and job.parallelism.context_parallel_method == "ring"


def row_problems(job: Job) -> Iterator[Problem]:
    """What stands between the job and its context-parallel degree, beside what tables of the model say themselves."""
    if sharers(job) == 1:
        return
    yield from _uneven(job, "training.seq_len", job.training.seq_len, degree(job))
    if job.validation.enable:
        yield from _uneven(job, "validation.seq_len", job.validation.seq_len, 1)
    parallelism, memory = job.parallelism, job.model.memory.model_dump()["type"]
    if parallelism.context_parallel_method == "ulysses" and parallelism.context_parallel_rotate_method == "alltoall":
        why = f'has no effect with {METHOD} = "ulysses", in which no keys and values go round'
        yield Problem(
            CROSS_FIELD,
            "parallelism.context_parallel_rotate_method",
            why,
            "alltoall",
            f'"allgather", or {METHOD} = "ring"',
        )
    if memory != "none":
        why = "keeps the newest tokens of each row as they come behind each other, of which with "
        why += f"{CONTEXT} = {sharers(job)} each rank has some"
        yield Problem(CROSS_FIELD, "model.memory.type", why, memory, f'"none", or {CONTEXT} = 1')


def _uneven(job: Job, key: str, value: int, pieces: int) -> Iterator[Problem]:
    """Rows that are not as many equal chunks as there are to be, of `pieces` equal parts for tensor parallelism."""
    n, balancer = sharers(job), job.parallelism.context_parallel_load_balancer
    each = math.lcm(len(DEALS[balancer](0, n)), pieces)
    if value % (n * each):
        why = f'cannot be cut: {CONTEXT} = {n}, parallelism.context_parallel_load_balancer = "{balancer}"'
        why += f" and {DEGREE} = {pieces}" if pieces > 1 else ""
        why += f" want a multiple of {n * each}"
        legal = ", ".join(str(d) for d in range(1, MOST + 1) if value % (d * each) == 0) or "1"
        yield Problem(CROSS_FIELD, key, why, value, f"{nearest(value, n * each)}, or {CONTEXT} = {legal}")


def attention_problems(attention: HeadAttention.Config, job: Job) -> Iterable[Problem]:
    """What of an attention does not go with context parallelism. Keys are relative to it."""
    if sharers(job) == 1:
        return ()
    return (_of_ring if takes_rings(job) else _of_ulysses)(attention, job)


def _of_ring(attention: HeadAttention.Config, job: Job) -> Iterator[Problem]:
    """Results of parts of the keys have to be merged."""
    able = f'{METHOD} = "ulysses" or {CONTEXT} = 1'
    if not attention.score.softmax:
        why = (
            f'is no softmax: {METHOD} = "ring" ({CONTEXT} = {sharers(job)}) merges parts by the sum of its exponentials'
        )
        yield Problem(CROSS_FIELD, ".score.type", why, attention.score.model_dump()["type"], f"a softmax, or {able}")
    if attention.kernel.no_parts:
        why = f'does not go with {METHOD} = "ring" ({CONTEXT} = {sharers(job)}): {attention.kernel.no_parts}'
        name = attention.kernel.model_dump()["type"]
        yield Problem(CROSS_FIELD, ".kernel.type", why, name, f'"auto", "sdpa" or "eager", or {able}')


def _of_ulysses(attention: HeadAttention.Config, job: Job) -> Iterator[Problem]:
    """Heads are dealt to the ranks, behind what tensor parallelism has left of them."""
    n, tp = sharers(job), degree(job)
    if attention.n_heads % tp:
        return
    with_tp = f" and {DEGREE} = {tp}" if tp > 1 else ""
    what = f'{METHOD} = "ulysses" deals heads to ranks, and {CONTEXT} = {n}{with_tp}'
    heads, groups = attention.n_heads // tp, max(1, attention.groups() // tp)
    if heads % n:
        legal = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        allowed = f'{nearest(attention.n_heads, n * tp)}, or {CONTEXT} = {legal}, or {METHOD} = "ring"'
        yield Problem(CROSS_FIELD, ".n_heads", f"{what} does not divide them", attention.n_heads, allowed)
    elif groups % n and n % groups:
        fit = [g for g in range(1, attention.n_heads + 1) if _deals(g, attention.n_heads, n, tp)]
        allowed = f'{", ".join(map(str, fit))}, or {METHOD} = "ring"'
        why = f"{what} is neither a divisor nor a multiple of them"
        yield Problem(CROSS_FIELD, ".n_kv_heads", why, attention.groups(), allowed)


def _deals(groups: int, heads: int, n: int, tp: int) -> bool:
    """Whether so many key/value heads can be dealt."""
    of_rank = max(1, groups // tp)
    return heads % groups == 0 and (groups % tp == 0 or tp % groups == 0) and (of_rank % n == 0 or n % of_rank == 0)
