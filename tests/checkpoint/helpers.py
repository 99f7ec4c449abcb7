"""Small checkpoints and managers for the tests, and forked children that may be killed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_lite.checkpoint.config import Checkpoint
from titan_lite.checkpoint.facts import RunFacts
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.world import Alone, World

FACTS = RunFacts('[model]\nname = "tiny"\n', {"dim": 4, "attention": {"n_heads": 2}}, tokenizer="t0", data="d0")
STATE = {"step": 1, "tokens_seen": 2**40 + 1, "cursors": [[0, 1], [2, 3]]}


def make_manager(folder: Path, world: World | None = None, facts: RunFacts = FACTS, **config: Any) -> CheckpointManager:
    config = {"enable": True, "interval": 10, "keep_latest_k": 0} | config
    return CheckpointManager(Checkpoint(**config), folder, world or Alone(), facts)


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Two weights and their optimizer state, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(9, 5, generator=generator), "b": torch.randn(9, generator=generator).bfloat16()}
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors[f"optim.{name}.exp_avg"] = torch.randn(weight.shape, generator=generator)
        tensors[f"optim.{name}.step"] = torch.tensor(float(seed + 1))
    return tensors


def zeros_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(
            left[name].reshape(-1).contiguous().view(torch.uint8),
            right[name].reshape(-1).contiguous().view(torch.uint8),
        )
        for name in left
    )


def forked(body: Callable[[], None]) -> int:
    """Runs `body` in a forked child; returns its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
