"""torch.compile, one graph per distinct block and one for the loss."""

from __future__ import annotations

from functools import partial

import torch

from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import Wrap
from titan_lite.parallel.config import Compile


def compile_blocks(model: Transformer, config: Compile) -> None:
    """Compiles each distinct block in place; equal blocks share one graph."""
    if config.enable and "model" in config.components:
        for block in model.stack.blocks.values():
            block.compile(backend=config.backend, fullgraph=True)


def loss_compiler(config: Compile) -> Wrap:
    """What to wrap the functions of logits in: torch.compile where the config says so, else nothing."""
    if config.enable and "loss" in config.components:
        return partial(torch.compile, backend=config.backend, fullgraph=True)
    return lambda function: function
