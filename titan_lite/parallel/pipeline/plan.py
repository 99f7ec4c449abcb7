"""Which stage has which layers, and which rank has which stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

from titan_lite.parallel.pipeline.schedule import KINDS, Table, table_of

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.parallel.config import Parallelism


Copied: TypeAlias = Literal["nothing", "table", "all"]


class PlanError(ValueError):
    """There is no such division: `key` of [parallelism] says what cannot be, `allowed` what can."""

    def __init__(self, key: str, why: str, allowed: str):
        super().__init__(why)
        self.key, self.allowed = key, allowed


@dataclass(frozen=True)
class StagePlan:
    """The layers of each stage, in order. The first one embeds, the last one has norm, head and `mtp`."""

    layers: Sequence[range]
    rank_of: Sequence[int]
    """The rank of each stage."""

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in order."""
        return [stage for stage, its in enumerate(self.rank_of) if its == rank]

    @property
    def n_stages(self) -> int:
        """All of them."""
        return len(self.layers)


def copied_part(job: Job) -> Copied:
    """What of the embedding the last stage has too, as a copy that stays equal."""
    if job.model.mtp.embeds:
        return "all"
    return "table" if job.model.head.tied else "nothing"


def micro_batch_rows(job: Job) -> int:
    """Rows of the largest forward pass in training."""
    layout = job.parallelism
    several = layout.pipeline_parallel_degree > 1
    return layout.pipeline_parallel_microbatch_size if several else job.training.local_batch_size


def n_micro_batches(job: Job) -> int:
    """How many of them go through in one run of the schedule, which takes training.local_batch_size rows."""
    return job.training.local_batch_size // micro_batch_rows(job)


def stage_plan(job: Job) -> StagePlan:
    """The division that the job asks for. Raises PlanError."""
    layout, n_layers = job.parallelism, job.model.n_layers
    ranks = layout.pipeline_parallel_degree
    if layout.pipeline_parallel_schedule_csv:
        from titan_lite.parallel.pipeline.table_file import read_table

        rank_of = read_table(layout.pipeline_parallel_schedule_csv, ranks, n_micro_batches(job)).rank_of
        return StagePlan(_divided(layout, n_layers, len(rank_of)), rank_of)
    n_stages = _stage_count(layout, n_layers)
    vee = KINDS[layout.pipeline_parallel_schedule].vee
    rank_of = [min(stage, 2 * ranks - 1 - stage) if vee else stage % ranks for stage in range(n_stages)]
    return StagePlan(_divided(layout, n_layers, n_stages), rank_of)


def job_table(job: Job) -> Table:
    """What each pipeline rank of the job computes in one run of its schedule."""
    layout = job.parallelism
    ranks, n = layout.pipeline_parallel_degree, n_micro_batches(job)
    if layout.pipeline_parallel_schedule_csv:
        from titan_lite.parallel.pipeline.table_file import read_table

        return read_table(layout.pipeline_parallel_schedule_csv, ranks, n)
    return table_of(layout.pipeline_parallel_schedule, ranks, stage_plan(job).n_stages // ranks, n)


def _stage_count(layout: Parallelism, n_layers: int) -> int:
    ranks, name = layout.pipeline_parallel_degree, layout.pipeline_parallel_schedule
    if layout.module_fqns_per_model_part is not None:
        n_stages, key = len(layout.module_fqns_per_model_part), "module_fqns_per_model_part"
    elif layout.pipeline_parallel_layers_per_stage is not None:
        key = "pipeline_parallel_layers_per_stage"
        n_stages = math.ceil(_weighted(layout, n_layers) / layout.pipeline_parallel_layers_per_stage)
    else:
        return ranks * (1 if KINDS[name].stages == "one" else 2)
    legal = {"one": [1], "two": [2], "several": range(2, 1 + max(2, n_layers // ranks))}[KINDS[name].stages]
    if n_stages not in {ranks * each for each in legal}:
        words = {"one": "one stage", "two": "two stages", "several": "as many stages, two or more,"}
        why = f'makes {n_stages} stages, but pipeline_parallel_schedule = "{name}" has {words[KINDS[name].stages]} '
        why += f"on each of pipeline_parallel_degree = {ranks} ranks"
        raise PlanError(key, why, _such_counts(layout, n_layers, [ranks * each for each in legal]))
    return n_stages


def _such_counts(layout: Parallelism, n_layers: int, legal: Sequence[int]) -> str:
    if layout.module_fqns_per_model_part is not None:
        return f"{', '.join(map(str, legal[:4]))} lists"
    per_stage = range(1, 1 + _weighted(layout, n_layers))
    fitting = [n for n in per_stage if math.ceil(_weighted(layout, n_layers) / n) in legal]
    near = sorted(fitting, key=lambda n: abs(n - (layout.pipeline_parallel_layers_per_stage or 1)))[:4]
    return ", ".join(map(str, sorted(near))) or "another degree, or another schedule"


def _weighted(layout: Parallelism, n_layers: int) -> int:
    """Layers, with what embedding and head count for."""
    ends = layout.pipeline_parallel_first_stage_less_layers + layout.pipeline_parallel_last_stage_less_layers
    return n_layers + ends


def _divided(layout: Parallelism, n_layers: int, n_stages: int) -> list[range]:
    lists = layout.module_fqns_per_model_part
    return balanced(layout, n_layers, n_stages) if lists is None else listed(lists, n_layers, n_stages)


def balanced(layout: Parallelism, n_layers: int, n_stages: int) -> list[range]:
    """The same cost on each stage, the first ones one layer more where that does not go up. As torchtitan does it."""
    first, last = layout.pipeline_parallel_first_stage_less_layers, layout.pipeline_parallel_last_stage_less_layers
    counts = _counts(n_layers, first, last, n_stages)
    if not _is_enough(counts, first, last):
        why = f"makes {n_stages} stages, which is too many for n_layers = {n_layers}, with {first} for the embedding "
        why += f"and {last} for the head"
        raise PlanError("pipeline_parallel_degree", why, f"at most {_most_stages(n_layers, first, last)} stages")
    return _ranges(counts)


def _counts(n_layers: int, first: int, last: int, n_stages: int) -> list[int]:
    share, more = divmod(n_layers + first + last, n_stages)
    counts = [share + (stage < more) for stage in range(n_stages)]
    counts[0] -= first
    counts[-1] -= last
    return counts


def _is_enough(counts: Sequence[int], first: int, last: int) -> bool:
    """Whether each stage has something: the ends may have no layer where the embedding, or the head, counts."""
    least = [0 if first else 1, *[1] * (len(counts) - 2), 0 if last else 1]
    return all(count >= at_least for count, at_least in zip(counts, least, strict=True))


def _most_stages(n_layers: int, first: int, last: int) -> int:
    every = range(2, n_layers + 3)
    return max((n for n in every if _is_enough(_counts(n_layers, first, last, n), first, last)), default=1)


def _ranges(counts: Sequence[int]) -> list[range]:
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [range(begin, end) for begin, end in pairwise(starts)]


def listed(lists: Sequence[Sequence[str]], n_layers: int, n_stages: int) -> list[range]:
    """The layers of lists of modules; see `StagePlan` for where the others have to be."""
    key = "module_fqns_per_model_part"
    if len(lists) != n_stages:
        raise PlanError(key, f"has {len(lists)} lists, but the schedule has {n_stages} stages", f"{n_stages} lists")
    layers = [f"stack.blocks.{number}" for number in range(n_layers)]
    order = ["embedding", *layers, "norm", "head"]
    given = [name for names in lists for name in names if name != "mtp"]
    if wrong := [name for name in given if name not in order]:
        raise PlanError(
            key, f"has no part of the model: {', '.join(wrong)}", f"embedding, {layers[0]} to {layers[-1]}, norm, head"
        )
    if twice := sorted({name for name in given if given.count(name) > 1}, key=order.index):
        raise PlanError(key, f"has {', '.join(twice)} twice", "each module once")
    if missing := [name for name in order if name not in given]:
        raise PlanError(key, f"lacks {', '.join(missing)}", "each module once")
    if given != order:
        wrong_one = next(name for name, right in zip(given, order, strict=True) if name != right)
        raise PlanError(key, f"has {wrong_one} out of order", "the order of the model: embedding, layers, norm, head")
    for name, stage in (("embedding", 0), ("norm", -1), ("head", -1)):
        if name not in lists[stage]:
            raise PlanError(
                key, f"has {name} on another stage than the {'last' if stage else 'first'}", f"it in list {stage}"
            )
    if any("mtp" in names for names in lists[:-1]):
        raise PlanError(key, "has mtp on another stage than the last", "it in the last list, or nowhere")
    counts = [sum(name in layers for name in names) for names in lists]
    if not _is_enough(counts, 1, 1):
        raise PlanError(key, f"has nothing in list {counts.index(0, 1)}", "a layer or more in each list but the ends")
    return _ranges(counts)
