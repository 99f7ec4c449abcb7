"""torch.compile, one graph per distinct block and one for the loss."""

from __future__ import annotations

import torch

from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import TokenLoss
from titan_lite.parallel.config import Compile


def compile_blocks(model: Transformer, config: Compile) -> None:
    """Compiles each distinct block in place; equal blocks share one graph."""
    if config.enable and "model" in config.components:
        for block in model.stack.blocks.values():
            block.compile(backend=config.backend, fullgraph=True)


def compile_loss(loss: TokenLoss, config: Compile) -> TokenLoss:
    """The loss of given logits, compiled where the config says so."""
    if config.enable and "loss" in config.components:
        return torch.compile(loss, backend=config.backend, fullgraph=True)
    return loss
