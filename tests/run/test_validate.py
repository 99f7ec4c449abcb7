"""Validation loss and bits per byte against the definition, and the same for every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from tests.runs import CPU, tiny_job
from titan_lite.data.batch import IGNORE
from titan_lite.data.loader import validation_batches
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.signals import StopFlag
from titan_lite.run.validate import validate
from titan_lite.step import build

RTOL = 1e-6


def sections(folder: Path) -> dict[str, Any]:
    """Sixty documents, about half of them held out, of one- to three-byte characters."""
    path = folder / "documents.jsonl"
    if not path.exists():
        path.write_text("\n".join(json.dumps({"text": f"döcument {i} €" * (i % 5 + 1)}) for i in range(60)))
    return {
        "data": {"held_out": 0.5, "source": {"type": "files", "path": str(path)}},
        "validation": {"enable": True, "local_batch_size": 3, "seq_len": 24},
    }


def validated(folder: Path) -> tuple[float, float, int]:
    """Loss, bits per byte and tokens of the initial model in this process's world."""
    job = tiny_job(**sections(folder))
    world = World.connect(job.parallelism, CPU, sharded=dist.is_initialized(), timeout_seconds=60)
    training = build(job, world, Precision.of(job, CPU), 256)
    tokenizer = job.tokenizer.build()
    batches = validation_batches(job.data, job.validation, tokenizer, dp_rank=world.rank, dp_size=world.size)
    result = validate(training, batches, tokenizer.token_bytes, 0, StopFlag())
    assert result is not None
    return result.loss, result.bits_per_byte, result.tokens


def test_loss_and_bits_per_byte_by_definition_on_one_and_two_ranks(tmp_path: Path, pool2):
    job = tiny_job(**sections(tmp_path))
    world = World(0, 1, CPU)
    model = build(job, world, Precision.of(job, CPU), 256).model.eval()
    tokenizer = job.tokenizer.build()
    nats, tokens, text = 0.0, 0, b""
    for batch in validation_batches(job.data, job.validation, tokenizer, dp_rank=0, dp_size=1):
        with torch.no_grad():
            losses = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="none")
        nats += losses.sum().item()
        targets = batch.targets[batch.targets != IGNORE]
        tokens += len(targets)
        text += bytes(t for t in targets.tolist() if t < 0xF8)  # 0xFE and 0xFF frame the documents
    assert "€".encode() in text
    expected = (nats / tokens, nats / math.log(2) / len(text), tokens)
    for got in (validated(tmp_path), *pool2.run(validated, tmp_path)):
        assert got == pytest.approx(expected, rel=RTOL)
