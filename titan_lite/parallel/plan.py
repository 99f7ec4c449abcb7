"""How a module is split over the ranks of a tensor-parallel group: the words of `Module.tp_plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from titan_lite.config.errors import CROSS_FIELD, Problem

if TYPE_CHECKING:
    from titan_lite.job import Job

DEGREE = "parallelism.tensor_parallel_degree"
EXPERT_DEGREE = "parallelism.expert_parallel_degree"
SPLIT_DEGREE = "parallelism.expert_tensor_parallel_degree"


@dataclass(frozen=True)
class Style:
    """What happens to a module, to one of its parameters, or to a child with all that is in it."""

    word: Literal["gather", "col", "row", "seq"]
    groups: int = 0
    """For `col`: rows belong to so many heads, which are not cut; 0 = each row stands for itself."""
    repeats: bool = False
    """For `col`: with fewer heads than ranks, neighbouring ranks have the same one."""


GATHER = Style("gather")
"""The module reads all tokens: its first argument (B, T / n, D) is gathered to (B, T, D)."""
COL = Style("col")
"""Each rank has a part of the rows (of a vector: of the elements), and so makes a part of the output features."""
ROW = Style("row")
"""Each rank has a part of the columns; outputs are added up, and each rank gets its tokens of the sum. Of a bias each
rank adds its share."""
SEQ = Style("seq")
"""Each rank has all of it and works on what others do not have: on its own tokens, or its own heads. Gradients are
added up."""

Plan: TypeAlias = Mapping[str, Style]
"""{child or parameter: style}; "" is the module itself."""


ExpertPlan: TypeAlias = Mapping[str, int | None]
"""{parameter: dimension} of what each expert has for itself: rows of the first dimension. Where ranks split each expert
too, it is along the other `dimension`; None = each has all of it, and adds its share."""


def heads(n: int) -> Style:
    """`COL` for what belongs to n heads."""
    return replace(COL, groups=n)


def kv_heads(n: int) -> Style:
    """`COL` for what belongs to n key/value heads: each rank has those that its query heads read."""
    return replace(COL, groups=n, repeats=True)


def degree(job: Job) -> int:
    """Ranks over which each layer of the job is split."""
    return job.parallelism.tensor_parallel_degree


def split_problems(job: Job, key: str, value: int) -> Iterable[Problem]:
    """What is wrong with a size that is to be cut into equal parts, one for each tensor-parallel rank."""
    n = degree(job)
    if value % n:
        why = f"is split over tensor-parallel ranks, and {DEGREE} = {n} does not divide it"
        yield Problem(CROSS_FIELD, key, why, value, f"{nearest(value, n)}, or {DEGREE} = {divisors(value)}")


def spread_problems(job: Job, key: str, value: int, experts: int) -> Iterable[Problem]:
    """What is wrong with a setting that makes so many experts, of which each expert-parallel rank gets equally many."""
    n = job.parallelism.expert_parallel_degree
    if experts % n:
        why = f"makes {experts} experts, which are spread over ranks, and {EXPERT_DEGREE} = {n} does not divide them"
        yield Problem(CROSS_FIELD, key, why, value, f"{nearest(value, n)}, or {EXPERT_DEGREE} = {divisors(experts)}")


def divisors(value: int) -> str:
    """The degrees up to 64 that divide a size, as one reads them."""
    return ", ".join(str(d) for d in range(1, min(value, 64) + 1) if value % d == 0)


def nearest(value: int, n: int) -> int:
    """The multiple of n, not 0, that is nearest to a value."""
    return max(1, round(value / n)) * n
