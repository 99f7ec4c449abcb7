"""A trained model for inference: from its checkpoint, or from a Hugging Face folder, whole or a rank's part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titan_lite.checkpoint.folder import find_checkpoint
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.state import model_tensors
from titan_lite.config.check import cross_problems
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_toml
from titan_lite.data.pieces import prompt_ids
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.generation.ends import ends_of
from titan_lite.generation.engine import Engine, alone, no_memory
from titan_lite.job import Job
from titan_lite.models.memory import LaneMemory
from titan_lite.models.module import warn_of_doubts
from titan_lite.models.transformer import Transformer, vocab_size_for
from titan_lite.parallel.config import Parallelism
from titan_lite.parallel.plan import DEGREE
from titan_lite.parallel.precision import DTYPES
from titan_lite.parallel.tensor import apply_tensor_parallel
from titan_lite.parallel.world import World
from titan_lite.step import lane_memory


class Pretrained(NamedTuple):
    """What a checkpoint holds for inference."""

    model: Transformer
    tokenizer: Tokenizer
    job: Job
    """The config it was trained with."""

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text to continue, never none."""
        return prompt_ids(self.tokenizer, self.job.data.bos, text)

    def ends(self) -> frozenset[int]:
        """Tokens with which the model ends a text, or its turn in a conversation."""
        return frozenset(ends_of(self.tokenizer))

    def memory(self) -> LaneMemory:
        """What the model's training remembered with, empty."""
        return lane_memory(self.job, self.model, self.device, DTYPES[self.job.training.dtype])

    def remembers(self) -> bool:
        """Whether texts are read in segments, of which each remembers those before."""
        return self.memory().decoding(self.job.training.seq_len) is not None

    def engine(self, agree: Callable[[Any], Any] = alone) -> Engine:
        """What decodes from it; see `Engine` for `agree`."""
        new_memory = partial(self.memory().decoding, self.job.training.seq_len) if self.remembers() else no_memory
        return Engine(self.model, self.device, self.tokenizer.vocab_size, self.ends(), agree, new_memory)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a Hugging Face folder rather than a checkpoint of ours."""
    return (path / "config.json").is_file()


def load_pretrained(path: Path, device: torch.device, world: World | None = None) -> Pretrained:
    """The model at a path, in eval mode on `device`; with a tensor-parallel `world` this rank's part of it. Collective.

    A path is a step-N folder, a checkpoint or dump folder (its newest step), or a Hugging Face folder. Raises
    ConfigError where there is none of these, or a damaged one, or one whose tokenizer files are gone.
    """
    if is_hf_folder(path):
        from titan_lite.hf.inference import load_folder

        return load_folder(path, device, world)
    folder = find_checkpoint(path, otherwise=", or a Hugging Face folder with its config.json")
    job = job_from_toml(read_manifest(folder).config, folder)
    tokenizer: Tokenizer = job.tokenizer.build()
    model = empty_model(job, vocab_size_for(job.model, tokenizer.vocab_size), device, world)
    restore(folder, model_tensors(model), world, model_only=True)
    warn_of_doubts(model, folder)
    return Pretrained(model.eval(), tokenizer, job)


def empty_model(job: Job, vocab_size: int, device: torch.device, world: World | None = None) -> Transformer:
    """The job's model, or this rank's part of it, its weights (of training.dtype) still to be filled."""
    dtype = DTYPES[job.training.dtype]
    with torch.device("meta"):
        model: Transformer = job.model.build(vocab_size=vocab_size)
    for parameter in model.parameters():  # buffers stay what they are
        parameter.data = parameter.data.to(dtype)
    if world is not None and world.tp_size > 1:
        _refuse_unsplittable(job, world.tp_size)
        assert world.mesh is not None, "ranks have a mesh"
        apply_tensor_parallel(model, world.mesh["tp"], {dtype: world.mesh["tp"]})
    model.to_empty(device=device)
    return model


def _refuse_unsplittable(job: Job, degree: int) -> None:
    """ConfigError where the model does not go into so many equal parts."""
    split = job.model_copy(update={"parallelism": Parallelism(tensor_parallel_degree=degree)})
    of_model = [p for p in cross_problems(split, None) if p.key == DEGREE or p.key.startswith("model.")]
    if of_model:
        raise ConfigError(of_model)
