"""torch.compile, one graph per distinct block and one for the loss."""

from __future__ import annotations

from functools import partial

import torch

from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import Wrap
from titan_lite.parallel.config import Compile

GRAPHS_PER_BLOCK = 8
"""As many as torch allows a function: training and evaluation, a last smaller micro-batch, ..."""


def compile_blocks(model: Transformer, config: Compile) -> None:
    """Compiles each distinct block in place; equal blocks share one graph."""
    if config.enable and "model" in config.components:
        # All blocks share one cache, and torch gives up on the ninth graph: layers may all be different.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, GRAPHS_PER_BLOCK * len(model.blocks()))
        for block in model.blocks().values():
            block.compile(backend=config.backend, fullgraph=True)


def loss_compiler(config: Compile) -> Wrap:
    """What to wrap the functions of logits in: torch.compile where the config says so, else nothing."""
    if config.enable and "loss" in config.components:
        return partial(torch.compile, backend=config.backend, fullgraph=True)
    return lambda function: function
