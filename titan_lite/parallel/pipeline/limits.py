"""What a pipeline refuses when the config is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from titan_lite.config.errors import CROSS_FIELD, NOT_ALLOWED, ConfigError, Problem, show
from titan_lite.models.layers import variants
from titan_lite.models.memory import NoLaneMemory
from titan_lite.models.residual import Admin
from titan_lite.models.stack import PlainStack
from titan_lite.parallel.pipeline.plan import PlanError, StagePlan, copied_part, n_micro_batches, stage_plan
from titan_lite.parallel.pipeline.schedule import KINDS

if TYPE_CHECKING:
    from titan_lite.job import Job

DEGREE = "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
ROWS = "parallelism.pipeline_parallel_microbatch_size"
FROM_A_FILE = ("1F1B", "PipelineScheduleMulti")
"""What `pipeline_parallel_schedule` may be beside a file: its default, and what torchtitan asks for."""


def pipeline_problems(job: Job, world_size: int | None) -> Iterator[Problem]:
    """What stands between the job and its pipeline; nothing without one."""
    if job.parallelism.pipeline_parallel_degree == 1:
        return
    yield from _model(job)
    found = [*_schedule(job), *_rows(job, world_size)]
    yield from found
    if found:
        return
    try:
        plan = stage_plan(job)
    except PlanError as error:
        key = f"parallelism.{error.key}"
        yield Problem(CROSS_FIELD, key, str(error), getattr(job.parallelism, error.key), error.allowed)
        return
    yield from _ends(job, plan)
    yield from _split_backward(job)


def _schedule(job: Job) -> Iterator[Problem]:
    from titan_lite.config.schema import nearest

    name, file = job.parallelism.pipeline_parallel_schedule, job.parallelism.pipeline_parallel_schedule_csv
    if file and name not in FROM_A_FILE:
        why = f"has no effect beside parallelism.pipeline_parallel_schedule_csv = {show(file)}"
        yield Problem(CROSS_FIELD, SCHEDULE, why, name, "one of the two")
    elif not file and name not in KINDS:
        yield Problem(NOT_ALLOWED, SCHEDULE, "there is no such schedule", name, ", ".join(KINDS), nearest(name, KINDS))


def _rows(job: Job, world_size: int | None) -> Iterator[Problem]:
    layout, local = job.parallelism, job.training.local_batch_size
    rows, ranks, name = (
        layout.pipeline_parallel_microbatch_size,
        layout.pipeline_parallel_degree,
        layout.pipeline_parallel_schedule,
    )
    if local % rows:
        legal = ", ".join(str(n) for n in range(1, local + 1) if local % n == 0)
        why = f"is to divide training.local_batch_size = {local}, the rows of a run of the schedule"
        yield Problem(CROSS_FIELD, ROWS, why, rows, legal)
        return
    n, kind = n_micro_batches(job), KINDS.get(name)
    if kind and not layout.pipeline_parallel_schedule_csv and not kind.fits(n, ranks):
        near = sorted((m for m in range(1, 2 * n + 2 * ranks + 1) if kind.fits(m, ranks)), key=lambda m: abs(m - n))[:2]
        why = f"makes {n} micro-batches of {ROWS} = {rows} rows, and their number {kind.rule}: "
        why += f'{SCHEDULE} = "{name}", {DEGREE} = {ranks}'
        allowed = " or ".join(str(m * rows) for m in sorted(near))
        yield Problem(CROSS_FIELD, "training.local_batch_size", why, local, allowed)
    degree = layout.data_parallel_degree(world_size) if world_size else None
    whole = job.training.global_batch_size
    if degree and whole != -1 and whole % degree == 0 and whole // degree % local:
        step = degree * local
        sizes = [size for size in (whole // step * step, (whole // step + 1) * step) if size]
        why = f"is {whole // degree} rows for each data-parallel rank, and a pipeline takes them in runs of "
        why += f"training.local_batch_size = {local}"
        yield Problem(CROSS_FIELD, "training.global_batch_size", why, whole, " or ".join(map(str, sizes)))


def refuse_part_of_a_run(job: Job, rows: int) -> None:
    """Raises ConfigError where a rank's `rows` of the global batch, a checkpoint's maybe, are not whole runs."""
    local = job.training.local_batch_size
    if job.parallelism.pipeline_parallel_degree > 1 and rows % local:
        why = f"does not divide the {rows} rows of each data-parallel rank, which a pipeline takes in runs of so many"
        legal = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise ConfigError.at("training.local_batch_size", why, local, legal, code=CROSS_FIELD)


def _model(job: Job) -> Iterator[Problem]:
    model, degree = job.model, job.parallelism.pipeline_parallel_degree
    if not isinstance(model.stack, PlainStack.Config):
        why = f"runs blocks several times, or shares them between layers, and {DEGREE} = {degree} puts layers on "
        why += "different ranks"
        kind = model.stack.model_dump()["type"]
        yield Problem(CROSS_FIELD, "model.stack.type", why, kind, f'"plain", or {DEGREE} = 1')
    if not isinstance(model.memory, NoLaneMemory.Config):
        why = f"keeps something of each layer for the next step, which {DEGREE} = {degree} does not do yet"
        kind = model.memory.model_dump()["type"]
        yield Problem(CROSS_FIELD, "model.memory.type", why, kind, f'"none", or {DEGREE} = 1')
    for variant in variants(model):
        residual = variant.layer.residual
        if isinstance(residual, Admin.Config) and residual.start == "profile":
            why = f"measures layer after layer before the first step, which {DEGREE} = {degree} does not do yet"
            allowed = f'"closed_form", or {DEGREE} = 1'
            yield Problem(CROSS_FIELD, f"{variant.key('residual')}.start", why, "profile", allowed)


def _ends(job: Job, plan: StagePlan) -> Iterator[Problem]:
    """What first and last stage have to do with each other."""
    if copied_part(job) != "nothing" and plan.rank_of[0] == plan.rank_of[-1]:
        key, value = ("model.mtp.type", "modules") if job.model.mtp.embeds else ("model.head.tied", True)
        why = "uses the embedding on the last stage too, which is on the same rank as the first with "
        why += (
            f"{SCHEDULE} = {show(job.parallelism.pipeline_parallel_schedule)}: FSDP shards a parameter with one stage"
        )
        others = ", ".join(name for name, kind in KINDS.items() if not kind.vee)
        yield Problem(CROSS_FIELD, key, why, value, f"another value, or one of {others}")
    if job.model.mtp.weights() and not job.model.mtp.embeds and not plan.layers[-1]:
        why = "reads what the last layer reads, and the last pipeline stage has no layer: "
        why += f"{DEGREE} = {job.parallelism.pipeline_parallel_degree}"
        allowed = 'a layer on the last stage, or model.mtp.type = "modules" or "none"'
        yield Problem(CROSS_FIELD, "model.mtp.type", why, job.model.mtp.model_dump()["type"], allowed)


def _split_backward(job: Job) -> Iterator[Problem]:
    """What cannot be with a backward of inputs and one of weights."""
    name, file = job.parallelism.pipeline_parallel_schedule, job.parallelism.pipeline_parallel_schedule_csv
    if file:
        from titan_lite.parallel.pipeline.table_file import read_table

        splits = read_table(file, job.parallelism.pipeline_parallel_degree, n_micro_batches(job)).splits
    else:
        splits = KINDS[name].splits
    if not splits:
        return
    key, value = ("parallelism.pipeline_parallel_schedule_csv", file) if file else (SCHEDULE, name)
    whole = ", ".join(name for name, kind in KINDS.items() if not kind.splits)
    halves = "runs backward in two halves, of inputs and of weights, "
    if job.compile.compiles("model"):
        why = f"{halves}and torch.compile makes one graph of both: compile.enable, compile.components"
        yield Problem(CROSS_FIELD, key, why, value, f"{whole}; or the model not compiled")
    checkpoint = job.activation_checkpoint
    if checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op":
        why = f'{halves}and what activation_checkpoint.selective_ac_option = "op" keeps can be read once'
        yield Problem(CROSS_FIELD, key, why, value, f'{whole}; or activation_checkpoint.mode = "full" or "none"')
    if job.parallelism.fsdp_reshard_after_forward == "always":
        why = f"{halves}and torch looks for the weights before parallelism.fsdp_reshard_after_forward = "
        why += '"always" has gathered them again'
        yield Problem(CROSS_FIELD, key, why, value, f'{whole}; or fsdp_reshard_after_forward = "default" or "never"')
