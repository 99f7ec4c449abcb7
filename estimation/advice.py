"""What would make a job fit that does not: the changes that cost the least time, each with an estimate of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from estimation.devices import Device
from estimation.layouts import LOCAL_BATCH, REPLICATE, SHARD
from estimation.plan import FULL, OP
from estimation.question import CONTEXT, PIPELINE, TENSOR, Changes, Outcome, Question, sequences, value_at, workers
from titan_lite.config.errors import ConfigError
from titan_lite.job import Job

MOST = 3
"""Changes that are named."""
STEPS = 3
"""How many changes may be made together, where fewer do not help."""
LOSS_CHUNK = 1024
"""Tokens whose logits exist at a time, where all of them did."""

GLOBAL_BATCH = "training.global_batch_size"
CHUNK = "training.loss_chunk_tokens"
COMPUTE = "training.mixed_precision_param"
RESHARD = "parallelism.fsdp_reshard_after_forward"
OFFLOADS = ("training.enable_optimizer_offload", "training.enable_cpu_offload", "activation_checkpoint.offload")


def advice(question: Question, processes: int | None, tell: Callable[[str], None]) -> list[Outcome]:
    """Up to `MOST` outcomes that fit, cheapest first: of one change each, or of a few together where no one is enough.

    Empty where nothing that is tried helps. Only what training accepts is tried; the tokens of a step stay the same.
    """
    together: Changes = {}
    for _ in range(STEPS):
        tried = [{**together, **change} for change in _legal(question, together)]
        tell(f"trying {len(tried)} changes")
        with workers(processes, len(tried)) as each:
            outcomes = list(each(partial(_answered, question), tried))
        if fitting := [outcome for outcome in outcomes if outcome.fits]:
            return sorted(fitting, key=lambda outcome: (outcome.seconds_per_token, outcome.reserved_gib))[:MOST]
        if not outcomes:
            break
        together = max(outcomes, key=lambda outcome: outcome.spare_gib).changes
    return []


def _answered(question: Question, changes: Changes) -> Outcome:
    return question.answer(changes)


def _legal(question: Question, together: Changes) -> Iterator[Changes]:
    """Changes on top of those made already, as far as training accepts them all."""
    job = question.job(together)
    for change in candidates(job, question.world_size, question.device):
        try:
            question.job({**together, **change})
        except ConfigError:
            continue
        yield change


def candidates(job: Job, world_size: int, device: Device) -> Iterator[Changes]:
    """What takes less memory than the job as it is, legal or not."""
    yield from _recomputing(job)
    if not 0 < job.training.loss_chunk_tokens <= LOSS_CHUNK:
        yield {CHUNK: LOSS_CHUNK}
    rows = sequences(job, world_size)
    local = min(job.training.local_batch_size, rows)
    for smaller in dict.fromkeys((local // 2, 1)):
        if 0 < smaller < local:
            yield {LOCAL_BATCH: smaller, GLOBAL_BATCH: rows}
    for key in (TENSOR, CONTEXT, PIPELINE):
        yield {key: 2 * value_at(job, key), SHARD: -1, GLOBAL_BATCH: rows}
    if job.parallelism.data_parallel_replicate_degree > 1:
        yield {REPLICATE: 1, SHARD: -1}
    if job.parallelism.fsdp_reshard_after_forward == "never":
        yield {RESHARD: "default"}
    if job.training.mixed_precision_param == "float32":
        yield {COMPUTE: "bfloat16"}
    if not device.is_cpu:
        for key in OFFLOADS:
            if not value_at(job, key):
                yield {key: True}


def _recomputing(job: Job) -> Iterator[Changes]:
    checkpoint = job.activation_checkpoint
    if checkpoint.mode != "full":
        if checkpoint.mode != "selective" or checkpoint.selective_ac_option != "op":
            yield OP
        yield FULL
