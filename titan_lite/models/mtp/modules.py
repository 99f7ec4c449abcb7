"""Modules in a row, each of which reads one more token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.fields import PositiveFloat, PositiveInt
from titan_lite.models.block import Layer
from titan_lite.models.context import Context
from titan_lite.models.mtp.base import MTP, layer_context
from titan_lite.models.mtp.drafts import Cache, Drafts, ModuleDrafts, Read
from titan_lite.models.norm import Norm
from titan_lite.models.stack import Streams
from titan_lite.parallel.plan import SEQ, Plan

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer


def _stream(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return x


def _normed(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return norm(x)


READS: Final[dict[str, Read]] = {"stream": _stream, "normed": _normed}
"""By the names of model.mtp.reads."""


class SequentialModules(MTP):
    """h^k_i = block_k(W_k [norm(z^(k-1)_i); norm(e_(i+k))]) for k = 1..D; norm_k(h^k_i), by the model's head, predicts
    token i + k + 1; z is h or, with reads = "normed", norm(h) as the head gets it.

    h^0 is what the stack made, norm_0 the model's final norm, and e are the model's embeddings of the tokens. "stream",
    z^k = h^k, is the paper's "representation given by the main model". "normed", z^k = norm_k(h^k), is how the released
    weights are run (transformers' MtpLayer, vLLM's deepseek_mtp.py, SGLang's deepseek_nextn.py) and what Megatron-LM
    trains (multi_token_prediction.py). For k > 0, of which nothing is released, vLLM hands on h^k.

    Each module has a block like the last layer's and norms of its own. The objective is the loss of the next token +
    weight / D * the sum of the D mean losses. Source: arXiv 2412.19437, section 2.2 (DeepSeek-V3).
    """

    class Config(MTP.Config):
        type: Literal["modules"] = "modules"
        embeds: ClassVar[bool] = True
        depth: PositiveInt = 1
        """Modules D: tokens that are predicted behind the next one."""
        reads: Literal["stream", "normed"] = "stream"
        """What a module reads of what was made before it: the stream, or what the norm before the head makes of it."""
        weight: PositiveFloat = 0.3
        """Weight of their losses together."""

        def weights(self) -> tuple[float, ...]:
            return (self.weight / self.depth,) * self.depth

    def __init__(self, config: Config, dim: int, layer: Layer, norm: Norm.Config):
        read = READS[config.reads]
        super().__init__(config, [Predictor(dim, layer, norm, read) for _ in range(config.depth)])
        self.read = read

    def forward(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        states, z = [], self.read(streams.x, norm)
        ranks, row = self.ranks, context.row
        embedded = row.whole(ranks.gather(embedded, self.training))
        for k, predictor in enumerate(self.predictors.values(), 1):
            # The last k positions get the row's first tokens: nobody before them sees that, and they have no target.
            ahead = row.own(embedded.roll(-k, dims=1))
            ahead = ranks.own(ahead.transpose(0, 1), self.training).transpose(0, 1)
            z, state = predictor(z, ahead, layer_context(context, k, streams.carry))
            states.append(state)
        return states

    def drafts(
        self, model: Transformer, vocab_size: int, prompt: Sequence[int], new_cache: Callable[[], Cache]
    ) -> Drafts:
        return ModuleDrafts(model, vocab_size, prompt, new_cache, self.read)


class Predictor(nn.Module):
    """One module: (z (B, T, D), embeddings k ahead (B, T, D), context) -> (next z, state for the head)."""

    def __init__(self, dim: int, layer: Layer, norm: Norm.Config, read: Read):
        super().__init__()
        self.hidden_norm = layer.norm.build(dim=dim)
        self.token_norm = layer.norm.build(dim=dim)
        self.join = layer.linear.build(2 * dim, dim)
        self.block = layer.block.build(dim=dim, layer=layer)
        self.norm = norm.build(dim=dim)
        self.read = read

    def tp_plan(self) -> Plan:
        return dict.fromkeys(("hidden_norm", "token_norm", "join", "norm"), SEQ)

    def forward(self, z: Tensor, ahead: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        joined = self.join(torch.cat((self.hidden_norm(z), self.token_norm(ahead)), dim=-1))
        x, _ = self.block(joined, context)
        state = self.norm(x)
        return self.read(x, lambda _: state), state
