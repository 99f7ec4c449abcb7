"""torch.compile, one graph per distinct block and one for the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config

from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import Wrap
from titan_lite.parallel.config import ActivationCheckpoint, Compile

GRAPHS_PER_BLOCK = 8
"""As many as torch allows a function: training and evaluation, a last smaller micro-batch, ..."""


def compile_blocks(model: Transformer, config: Compile, checkpoint: ActivationCheckpoint) -> None:
    """Compiles each distinct block in place; equal blocks share one graph."""
    if config.compiles("model"):
        # All blocks share one cache, and torch gives up on the ninth graph: layers may all be different.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, GRAPHS_PER_BLOCK * len(model.blocks()))
        backend = _budgeted(config.backend, checkpoint) if checkpoint.mode == "memory_budget" else config.backend
        for block in model.blocks().values():
            block.compile(backend=backend, fullgraph=True)


def _budgeted(backend: str, checkpoint: ActivationCheckpoint) -> Callable[..., Any]:
    """A backend that keeps that share of a graph's activations.

    torch's own region for a budget inside of a forward refuses graphs that count something, as experts are counted.
    """
    from torch._dynamo import lookup_backend

    compiler = lookup_backend(backend)

    settings = {
        "activation_memory_budget": checkpoint.memory_budget,
        # The group of ranks that a collective is given, which holds no activations.
        "unsafe_treat_script_objects_as_zero_size": True,
    }

    def within_budget(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(settings):
            return compiler(graph, inputs)

    return within_budget


def loss_compiler(config: Compile) -> Wrap:
    """What to wrap the functions of logits in: torch.compile where the config says so, else nothing."""
    if config.compiles("loss"):
        return partial(torch.compile, backend=config.backend, fullgraph=True)
    return lambda function: function
