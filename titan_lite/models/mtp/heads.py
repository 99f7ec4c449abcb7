"""Heads side by side on one trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from titan_lite.config.fields import PositiveFloat, PositiveInt
from titan_lite.models.block import Layer
from titan_lite.models.context import Context
from titan_lite.models.mtp.base import MTP, layer_context
from titan_lite.models.mtp.drafts import Cache, Drafts, HeadDrafts
from titan_lite.models.norm import Norm
from titan_lite.models.stack import Streams

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer


class ParallelHeads(MTP):
    """norm(block_k(z_i)), by the model's head, predicts token i + k + 1, for k = 1..D; z is what the last layer reads.

    The last layer itself is the paper's first head, that of the next token: it has n = D + 1 of them, and its trunk is
    one layer less than model.n_layers. Blocks are like that layer, the final norm is the model's. The objective is the
    sum of all mean losses. With training.loss_chunk_tokens > 0 losses are taken one after the other, forward and
    backward to the states, so that no two of them have logits at a time. Source: arXiv 2404.19737.
    """

    class Config(MTP.Config):
        type: Literal["heads"] = "heads"
        depth: PositiveInt = 3
        """Heads D beside that of the next token."""
        weight: PositiveFloat = 1.0
        """Weight of each one's loss."""

        def weights(self) -> tuple[float, ...]:
            return (self.weight,) * self.depth

    def __init__(self, config: Config, dim: int, layer: Layer, norm: Norm.Config):
        super().__init__(config, [layer.block.build(dim=dim, layer=layer) for _ in range(config.depth)])

    def forward(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        states = []
        for k, block in enumerate(self.predictors.values(), 1):
            x, _ = block(streams.trunk, layer_context(context, k, streams.carry))
            states.append(norm(x))
        return states

    def drafts(
        self, model: Transformer, vocab_size: int, prompt: Sequence[int], new_cache: Callable[[], Cache]
    ) -> Drafts:
        return HeadDrafts(model, vocab_size)
