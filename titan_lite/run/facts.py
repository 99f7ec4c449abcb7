"""What is known of a run when its first step is about to start."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.models.attention import Attention
from titan_lite.models.attention.kernel import Kernel
from titan_lite.models.flops import active_parameters, anew_flops_per_token, training_flops_per_token
from titan_lite.models.transformer import Transformer
from titan_lite.run.device import device_name, peak_flops
from titan_lite.run.hooks import RunFacts

if TYPE_CHECKING:
    from titan_lite.step import Training
    from titan_lite.trainer import Trainer


def run_facts(trainer: Trainer) -> RunFacts:
    """Gathers the facts that hooks show and log."""
    job, training, progress, world = trainer.job, trainer.training, trainer.progress, trainer.world
    with torch.device("meta"):  # a rank may hold some layers only
        model: Transformer = job.model.build(vocab_size=training.model.vocab_size)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = sum(size for name, size in sizes.items() if training.specs[name].role == "embed")
    active = active_parameters(model, training.specs)
    name = device_name(world.device)
    n_keys = job.model.memory.keys(job.training.seq_len)
    dtype = str(trainer.precision.param).removeprefix("torch.")
    return RunFacts(
        description=job.job.description,
        model=f"{job.model.name} {job.model.flavor}".strip() or "custom",
        parameters=sum(sizes.values()),
        parameters_without_embedding=sum(sizes.values()) - embedding,
        flops_per_token=training_flops_per_token(model, training.specs, n_keys, logits=job.objective.logits_per_token)
        + anew_flops_per_token(model, job.model.memory.anew(job.training.seq_len)),
        layout=f"{world.layout}, {dtype} compute",
        kernels=attention_kernels(model, world.device, job.training.seq_len, n_keys),
        device=name,
        peak_flops=peak_flops(name),
        world_size=world.size,
        dp_size=world.dp_size,
        local_batch_size=min(job.training.local_batch_size, progress.global_batch_size // world.dp_size),
        global_batch_size=progress.global_batch_size,
        accumulation=trainer.accumulation,
        seq_len=job.training.seq_len,
        steps=job.training.steps,
        start_step=progress.step,
        data=job.data.source.build().describe(),
        dump_folder=trainer.folder,
        warnings=job.warnings,
        active_parameters=active if active < sum(sizes.values()) else None,
        remembered_bytes=training.memory.nbytes(progress.global_batch_size // world.dp_size),
        resting_bytes=partial(resting_bytes, training),
        resumed_from=trainer.resumed_from,
        run_id=trainer.checkpoints.run_id,
    )


def resting_bytes(training: Training) -> int:
    """What this rank's device holds of the model, the optimizer and the memory between two steps."""
    model, state = training.model, training.optimizer.state
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    tensors += [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    tensors += [tensor for slot in getattr(training.memory, "slots", {}).values() for tensor in slot.tensors().values()]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = (part.untyped_storage() for part in parts if part.device == training.world.device)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def attention_kernels(model: Transformer, device: torch.device, n_queries: int, n_keys: int) -> str:
    """The kernels of the model's attentions on rows of so many tokens, the commonest first."""
    parts = (part for module in model.modules() if isinstance(module, Attention) for part in module.shared())
    names = Counter(part.acting(device, n_queries, n_keys) for part in parts if isinstance(part, Kernel))
    if len(names) < 2:
        return "".join(names)
    return ", ".join(f"{name} x {count}" for name, count in names.most_common())
