"""A text given to a model in segments, as lanes give it to a training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.models.memory import XL, LaneMemory
from titan_lite.models.ranks import ALONE
from titan_lite.models.transformer import Transformer

B = 2


def tables(n_layers: int = 3, **attention: Any) -> dict[str, Any]:
    """A tiny model's."""
    return {"n_layers": n_layers, "attention": {"n_heads": 4, "n_kv_heads": 2, **attention}}


def sharp_model(seed: int = 0, **changes: Any) -> Transformer:
    """A tiny model whose scores tell tokens and positions apart."""
    model = tiny_model(seed, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention.q." in name or ".attention.k." in name:
                parameter.mul_(20)
    return model


def lanes(length: int, changes: dict[str, Any], summaries: nn.Module | None = None, **options: Any) -> XL:
    """The memory of a model with these changes; `summaries` are the model's, where it has any."""
    config = tiny_config(**changes)
    chosen = LaneMemory.Config.choose({"type": "xl", "length": length} | options)
    memory: XL = chosen.build(
        layers=config.each_layer(),
        dim=config.dim,
        device=torch.device("cpu"),
        dtype=torch.float32,
        ranks=ALONE,
        summaries=summaries or chosen.statistics(config.dim),
    )
    return memory


def tokens(length: int, rows: int = B) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


def stream(
    model: Transformer, memory: XL, pieces: list[Tensor], documents: list[Tensor] | None = None
) -> Iterator[Tensor]:
    """Logits of each piece (B, T), which goes on where the one before ended."""
    for i, piece in enumerate(pieces):
        slot = memory.of(torch.arange(len(piece)))
        of_piece = torch.zeros_like(piece) if documents is None else documents[i]
        yield model(piece, of_piece, slot)
        slot.advance(of_piece)
