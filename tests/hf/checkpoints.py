"""Checkpoints of random tiny models, as a run would have saved them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.hf.twins import randomise
from titan_lite.checkpoint.facts import Origin, RunFacts
from titan_lite.checkpoint.save import SaveRequest, write_step
from titan_lite.checkpoint.shard import shards_of
from titan_lite.checkpoint.state import model_tensors
from titan_lite.checkpoint.world import Alone
from titan_lite.config.load import job_from_dict, to_toml
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.job import Job
from titan_lite.models.transformer import Transformer, vocab_size_for


def save_random(
    dump: Path, model: dict[str, Any], dtype: torch.dtype = torch.float32, std: float = 0.1, **sections: Any
) -> Path:
    """`dump`/checkpoint/step-7 of a model with random weights; returns the dump folder. `sections` are the config's."""
    job = job_from_dict({"model": model, "training": {"seq_len": 128}, **sections}, files=False)
    tokenizer: Tokenizer = job.tokenizer.build()
    built: Transformer = job.model.build(vocab_size=vocab_size_for(job.model, tokenizer.vocab_size))
    randomise(built, std)
    save(dump, job, built.to(dtype))
    return dump


def save(dump: Path, job: Job, model: Transformer, step: int = 7) -> None:
    """A step folder with the model's weights."""
    folder = dump / "checkpoint"
    folder.mkdir(parents=True)
    facts = RunFacts(to_toml(job), job.model.identity(), job.tokenizer.build().fingerprint(), "d0")
    state = json.dumps({"step": step, "tokens_seen": 7168}).encode()
    origin = Origin("run0", step, None, model_only=False, world_size=1)
    write_step(SaveRequest(folder, origin, shards_of(model_tensors(model)), state), facts, Alone())
