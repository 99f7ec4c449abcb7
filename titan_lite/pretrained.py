"""A trained model, whole and in this process, from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from titan_lite.checkpoint.folder import find_checkpoint
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.state import model_tensors
from titan_lite.config.errors import NOT_AVAILABLE, ConfigError
from titan_lite.config.load import job_from_toml
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.job import Job
from titan_lite.models.module import warn_of_doubts
from titan_lite.models.transformer import Transformer, vocab_size_for
from titan_lite.parallel.precision import DTYPES


class Pretrained(NamedTuple):
    """What a checkpoint holds for inference."""

    model: Transformer
    tokenizer: Tokenizer
    job: Job
    """The config it was trained with."""


def load_pretrained(path: Path, device: torch.device) -> Pretrained:
    """The model of a step-N folder, or of the newest one in a checkpoint or dump folder, in eval mode on `device`.

    Raises ConfigError for a folder without a checkpoint, a damaged one, or one whose tokenizer files are gone.
    """
    if (path / "config.json").is_file():
        why = "is a Hugging Face folder; reading those is not available yet"
        raise ConfigError.at(str(path), why, allowed="a step-N, checkpoint or dump folder", code=NOT_AVAILABLE)
    folder = find_checkpoint(path)
    job = job_from_toml(read_manifest(folder).config, folder)
    tokenizer: Tokenizer = job.tokenizer.build()
    with torch.device("meta"):
        model: Transformer = job.model.build(vocab_size=vocab_size_for(job.model, tokenizer.vocab_size))
    for parameter in model.parameters():  # buffers stay what they are
        parameter.data = parameter.data.to(DTYPES[job.training.dtype])
    model.to_empty(device=device)
    restore(folder, model_tensors(model), model_only=True)
    warn_of_doubts(model, folder)
    return Pretrained(model.eval(), tokenizer, job)
