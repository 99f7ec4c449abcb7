"""What is known of a run when its first step is about to start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from titan_lite.models.flops import training_flops_per_token
from titan_lite.run.device import device_name, peak_flops
from titan_lite.run.hooks import RunFacts

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.parallel.precision import Precision
    from titan_lite.step import Training
    from titan_lite.trainer import Progress


def run_facts(
    job: Job, training: Training, precision: Precision, progress: Progress, accumulation: int, resumed_from: str | None
) -> RunFacts:
    """Gathers the facts that hooks show and log."""
    world = training.world
    sizes = {name: parameter.numel() for name, parameter in training.model.named_parameters()}
    embedding = sum(size for name, size in sizes.items() if training.specs[name].role == "embed")
    name = device_name(world.device)
    dtype = str(precision.param).removeprefix("torch.")
    return RunFacts(
        description=job.job.description,
        model=f"{job.model.name} {job.model.flavor}".strip() or "custom",
        parameters=sum(sizes.values()),
        parameters_without_embedding=sum(sizes.values()) - embedding,
        flops_per_token=training_flops_per_token(training.model, training.specs, job.training.seq_len),
        layout=f"{world.layout}, {dtype} compute",
        device=name,
        peak_flops=peak_flops(name),
        world_size=world.size,
        dp_size=world.dp_size,
        local_batch_size=min(job.training.local_batch_size, progress.global_batch_size // world.dp_size),
        global_batch_size=progress.global_batch_size,
        accumulation=accumulation,
        seq_len=job.training.seq_len,
        steps=job.training.steps,
        start_step=progress.step,
        data=job.data.source.build().describe(),
        dump_folder=Path(job.job.dump_folder),
        warnings=job.warnings,
        resumed_from=resumed_from,
    )
