"""Modules in a row, each of which reads one more token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.fields import PositiveFloat, PositiveInt
from titan_lite.models.block import Layer
from titan_lite.models.context import Context
from titan_lite.models.mtp.base import MTP, layer_context
from titan_lite.models.mtp.drafts import Cache, Drafts, ModuleDrafts
from titan_lite.models.norm import Norm
from titan_lite.models.stack import Streams
from titan_lite.parallel.plan import SEQ, Plan

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer


class SequentialModules(MTP):
    """h^k_i = block_k(W_k [norm(h^(k-1)_i); norm(e_(i+k))]) for k = 1..D; norm(h^k_i), by the model's head, predicts
    token i + k + 1.

    h^0 is what the stack made, before the final norm, and e are the model's embeddings of the tokens. Each module has a
    block like the last layer's and norms of its own. The objective is the loss of the next token + weight / D * the sum
    of the D mean losses. Source: arXiv 2412.19437, section 2.2 (DeepSeek-V3).
    """

    class Config(MTP.Config):
        type: Literal["modules"] = "modules"
        embeds: ClassVar[bool] = True
        depth: PositiveInt = 1
        """Modules D: tokens that are predicted behind the next one."""
        weight: PositiveFloat = 0.3
        """Weight of their losses together."""

        def weights(self) -> tuple[float, ...]:
            return (self.weight / self.depth,) * self.depth

    def __init__(self, config: Config, dim: int, layer: Layer, norm: Norm.Config):
        super().__init__(config, [Predictor(dim, layer, norm) for _ in range(config.depth)])

    def forward(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        states, x = [], streams.x
        ranks, row = self.ranks, context.row
        embedded = row.whole(ranks.gather(embedded, self.training))
        for k, predictor in enumerate(self.predictors.values(), 1):
            # The last k positions get the row's first tokens: nobody before them sees that, and they have no target.
            ahead = row.own(embedded.roll(-k, dims=1))
            ahead = ranks.own(ahead.transpose(0, 1), self.training).transpose(0, 1)
            x, state = predictor(x, ahead, layer_context(context, k, streams.carry))
            states.append(state)
        return states

    def drafts(
        self, model: Transformer, vocab_size: int, prompt: Sequence[int], new_cache: Callable[[], Cache]
    ) -> Drafts:
        return ModuleDrafts(model, vocab_size, prompt, new_cache)


class Predictor(nn.Module):
    """One module: (h (B, T, D), embeddings of the tokens k ahead (B, T, D), context) -> (h, normed for the head)."""

    def __init__(self, dim: int, layer: Layer, norm: Norm.Config):
        super().__init__()
        self.hidden_norm = layer.norm.build(dim=dim)
        self.token_norm = layer.norm.build(dim=dim)
        self.join = layer.linear.build(2 * dim, dim)
        self.block = layer.block.build(dim=dim, layer=layer)
        self.norm = norm.build(dim=dim)

    def tp_plan(self) -> Plan:
        return dict.fromkeys(("hidden_norm", "token_norm", "join", "norm"), SEQ)

    def forward(self, x: Tensor, ahead: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        x = self.join(torch.cat((self.hidden_norm(x), self.token_norm(ahead)), dim=-1))
        x, _ = self.block(x, context)
        return x, self.norm(x)
