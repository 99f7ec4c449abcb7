"""The language-model head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.embedding import Embedding
from titan_lite.models.head.logit_cap import LogitCap, NoLogitCap
from titan_lite.models.head.logit_scale import LogitScale, NoLogitScale
from titan_lite.models.head.output import Link, LogitFunction, Output
from titan_lite.models.head.reward import NoRewardHead, RewardHead
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module
from titan_lite.models.spec import Spec
from titan_lite.parallel.plan import COL, GATHER, SEQ, Plan

Consume = Callable[..., Tensor]
"""What becomes of the hidden states (B, T, D), given how logits come from them: the logits, or a loss.

Called as `consume(x, output, *further)`; from further states (B, T, D), if any were asked for, the same output makes
logits of tokens behind the next one.
"""


def all_logits(x: Tensor, output: Output) -> Tensor:
    """The `Consume` of inference: logits (B, T, V)."""
    return output.logits(x)


class Head(Module):
    """(hidden states (B, T, D), embedding, consume, further states) -> whatever `consume` makes of them.

    The loss runs inside the head's forward: a sharded head is gathered once, and logits need never exist as a whole.
    Built as `build(dim=, vocab_size=, linear=, embedding=)`; the embedding is that of the model, not the head's own.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "head"
        default_type: ClassVar[str | None] = "lm"
        tied: bool = False
        """Use the token embedding as the output matrix."""
        reward: RewardHead.Config = NoRewardHead.Config()
        """What says how good a text is."""

    reward: RewardHead


class LMHead(Head):
    """logits = cap(scale(x W^T + b)) with a matrix W of its own. Source: arXiv 1706.03762, section 3.4."""

    class Config(Head.Config):
        type: Literal["lm"] = "lm"
        bias: bool = False
        """Add a learned bias b to each token's logit."""
        logit_scale: LogitScale.Config = NoLogitScale.Config()
        """Factor of the logits."""
        logit_cap: LogitCap.Config = NoLogitCap.Config()
        """Bound of the logits, behind the factor."""

        def build(self, *args: Any, **sizes: Any) -> LMHead:
            return (TiedLMHead if self.tied else LMHead)(self, *args, **sizes)

    def __init__(self, config: Config, dim: int, vocab_size: int, linear: Linear.Config, embedding: Embedding):
        super().__init__()
        self.logit_scale = config.logit_scale.build(dim=dim, vocab_size=vocab_size)
        self.logit_cap = config.logit_cap.build()
        self.reward = config.reward.build(dim=dim)
        self.make_matrix(config, dim, vocab_size, linear, embedding)

    def make_matrix(
        self, config: Config, dim: int, vocab_size: int, linear: Linear.Config, embedding: Embedding
    ) -> None:
        """Makes what `forward` multiplies with."""
        self.output = linear.build(dim, vocab_size, role="head", bias=config.bias)

    def links(self, bias: Tensor | None) -> tuple[Link, ...]:
        """From x W^T to logits."""
        plus = () if bias is None else (Link(PLUS, bias),)
        return (*plus, *self.logit_scale.links(), *self.logit_cap.links())

    def tp_plan(self) -> Plan:
        return {"": GATHER, "output": COL, "logit_scale": COL, "reward": SEQ}

    def forward(self, x: Tensor, embedding: Embedding, consume: Consume, further: Sequence[Tensor] = ()) -> Tensor:
        output = Output(self.output.weight, self.links(self.output.bias), self.ranks, partial(self.reward, x))
        return consume(x, output, *self.all_tokens(further))

    def all_tokens(self, further: Sequence[Tensor]) -> Iterator[Tensor]:
        """Further states are gathered as the first ones are, which the plan does."""
        return (self.ranks.gather(x, self.training) for x in further)


class TiedLMHead(LMHead):
    """logits = cap(scale(x E^T + b)) with the embedding matrix E, which stays the embedding's.

    Where the rows of E have another width than the model, x W_out takes the place of x. Source: arXiv 1608.05859.
    """

    def make_matrix(
        self, config: LMHead.Config, dim: int, vocab_size: int, linear: Linear.Config, embedding: Embedding
    ) -> None:
        self.narrow = embedding.make_narrowing(linear)
        self.bias = nn.Parameter(torch.empty(vocab_size)) if config.bias else None

    def tp_plan(self) -> Plan:
        return {"": GATHER, "narrow": SEQ, "bias": COL, "logit_scale": COL, "reward": SEQ}

    def forward(self, x: Tensor, embedding: Embedding, consume: Consume, further: Sequence[Tensor] = ()) -> Tensor:
        output = Output(embedding.weight, self.links(self.bias), self.ranks, partial(self.reward, x))
        return consume(self.narrow(x), output, *map(self.narrow, self.all_tokens(further)))

    def param_specs(self) -> dict[str, Spec]:
        return {} if self.bias is None else {"bias": Spec("bias", 1, self.bias.numel(), 0.0)}


class Plus(LogitFunction):
    """z = u + b with b (V,)."""

    def __call__(self, u: Tensor, parameter: Tensor | None) -> Tensor:
        assert parameter is not None
        return u + parameter

    def backward_(self, grad: Tensor, u: Tensor, parameter: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return grad, grad.sum(dim=0)


PLUS = Plus()
