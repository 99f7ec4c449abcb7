"""Loss on the validation split."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy
import torch

from titan_lite.data.batch import IGNORE, Batch
from titan_lite.parallel.fsdp import evaluating
from titan_lite.run.hooks import ValidationResult
from titan_lite.run.signals import StopFlag
from titan_lite.step import Training


def validate(
    training: Training, batches: Iterable[Batch], token_bytes: numpy.ndarray, step: int, stop: StopFlag
) -> ValidationResult | None:
    """Mean loss per token and per byte of text over all ranks' batches, of which every rank must have as many.

    None where a signal to any rank asks to stop: there may be little time left to save.
    """
    start = time.perf_counter()
    world = training.world
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    n_tokens = n_read = text_bytes = 0
    with evaluating(training.model):
        for batch in batches:
            if world.total(bool(stop))[0]:
                return None
            device = world.device
            parts = (batch.tokens.to(device), batch.targets.to(device), batch.documents.to(device))
            for tokens, targets, documents, memory in training.reading(*parts):
                loss += training.validation_objective(training.model, tokens, targets, documents, memory=memory)
            counted = batch.targets[batch.targets != IGNORE]
            n_tokens += counted.numel()
            n_read += training.validation_objective.n_read(batch.targets, batch.documents)
            text_bytes += int(token_bytes[counted.numpy()].sum())
    nats = world.total_tensor(loss).item()
    all_tokens, all_read, all_bytes = world.total(n_tokens, n_read, text_bytes)
    return ValidationResult(
        step=step,
        loss=nats / all_tokens,
        bits_per_byte=nats / numpy.log(2).item() / all_bytes,
        tokens=int(all_read),
        seconds=time.perf_counter() - start,
        extra=training.validation_objective.numbers(world.total_tensor),
    )
