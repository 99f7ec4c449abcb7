"""Which layouts of experts a job can have, beside what the tables of experts say themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from titan_lite.config.errors import CROSS_FIELD, NOT_AVAILABLE, Problem, show
from titan_lite.parallel.plan import DEGREE, EXPERT_DEGREE, SPLIT_DEGREE, divisors

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.ffn import FFN

BACKEND = "parallelism.expert_parallel_comm_backend"
BALANCED = "debug.moe_force_load_balance"


def expert_problems(job: Job, world_size: int | None) -> Iterator[Problem]:
    """What stands between the job and its expert-parallel degrees, and its switch for balanced routing."""
    layout = job.parallelism
    yield from _switches(job)
    if not layout.spreads_experts:
        return
    tp, etp = layout.tensor_parallel_degree, layout.expert_tensor_parallel_degree
    if etp not in (1, tp):
        why = f"splits each expert over the ranks of {DEGREE} = {tp}, all of them or none"
        yield Problem(CROSS_FIELD, SPLIT_DEGREE, why, etp, f"1 or {tp}" if tp > 1 else f"1, or {DEGREE} = {etp}")
    elif not any(config.has_experts for config in _networks(job)):
        ep = layout.expert_parallel_degree
        key, value = (EXPERT_DEGREE, ep) if ep > 1 else (SPLIT_DEGREE, etp)
        kind = show(job.model.ffn.model_dump()["type"])
        why = f"spreads experts over ranks, and no layer of the model has any: model.ffn.type = {kind}"
        yield Problem(CROSS_FIELD, key, why, value, '1, or model.ffn.type = "moe" or "peer"')
    else:
        yield from _borrowed(job, world_size)


def _borrowed(job: Job, world_size: int | None) -> Iterable[Problem]:
    """The ranks over which experts are spread are ranks of other degrees."""
    layout = job.parallelism
    replicate, shard = layout.data_parallel_replicate_degree, layout.data_parallel_shard_degree
    if shard == -1:
        degree = None if world_size is None else layout.data_parallel_degree(world_size)
        if degree is None:  # not known, or told elsewhere
            return
        shard = degree // replicate
    ranks, ep = layout.token_ranks(shard), layout.expert_parallel_degree
    if ranks % ep:
        parts = {
            "data_parallel_shard_degree": shard,
            "context_parallel_degree": layout.context_parallel_degree,
            "tensor_parallel_degree": 1 if layout.expert_tensor_parallel_degree > 1 else layout.tensor_parallel_degree,
        }
        of = " x ".join(f"{key} {size}" for key, size in parts.items() if size > 1) or "data_parallel_shard_degree 1"
        why = f"does not divide the {ranks} ranks from which it takes its own: {of}"
        yield Problem(CROSS_FIELD, EXPERT_DEGREE, why, ep, divisors(ranks))


def _switches(job: Job) -> Iterable[Problem]:
    from titan_lite.models.ffn.moe import MoE

    backend = job.parallelism.expert_parallel_comm_backend
    if backend != "standard":
        why = "is not available: tokens travel by torch.distributed's own all-to-all"
        yield Problem(NOT_AVAILABLE, BACKEND, why, backend, '"standard"')
    if job.debug.moe_force_load_balance and not any(isinstance(config, MoE.Config) for config in _networks(job)):
        why = "has no effect: no layer of the model has experts to which a router sends tokens"
        yield Problem(CROSS_FIELD, BALANCED, why, True, 'false, or model.ffn.type = "moe"')


def _networks(job: Job) -> list[FFN.Config]:
    from titan_lite.models.layers import variants

    return [variant.layer.ffn for variant in variants(job.model)]
