"""The slot of what is minimised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from torch import Tensor, nn

from titan_lite.config.component import Component, SlotConfig
from titan_lite.data.batch import IGNORE
from titan_lite.models.context import NOT_TRAINING, Memory, TrainingFacts
from titan_lite.models.head.lm import Consume
from titan_lite.models.module import Total
from titan_lite.models.mtp import Further, nothing_further
from titan_lite.models.row import WHOLE, Row
from titan_lite.objectives.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer

Counted: TypeAlias = Iterable[tuple[Tensor, Tensor]]
"""(targets, documents), both (B, T), of each of this rank's micro-batches."""


class Objective(Component):
    """(model, tokens, targets, documents (B, T), facts, memory) -> this rank's summed loss, of which each target's
    share of the step's loss is 1 / targets of the global batch. Built as `build(cross_entropy=, row=)`.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "objective"
        default_type: ClassVar[str] = "lm"
        reads_pairs: ClassVar[bool] = False
        """Whether rows come in pairs: of each two the first is the better text."""

        @property
        def logits_per_token(self) -> float:
            """What part of a batch's tokens next-token logits are made of in training."""
            return 1.0

        def freeze(self, model: Transformer) -> None:
            """Switches off the gradients of what it does not train, so that nothing is kept for them."""

    def __init__(self, config: Config, cross_entropy: CrossEntropy, row: Row = WHOLE):
        """`cross_entropy`: of the next token; `row`: what this rank computes of the loss of each row."""
        self.config, self.cross_entropy, self.row = config, cross_entropy, row

    def __call__(
        self,
        model: nn.Module,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor,
        facts: TrainingFacts = NOT_TRAINING,
        memory: Memory | None = None,
    ) -> Tensor:
        consume, further = self.consuming(model, targets, documents, facts), self.further(model, facts)
        loss: Tensor = model(tokens, documents, memory, facts, consume=consume, further=further, row=self.row)
        return loss

    def consuming(self, model: nn.Module, targets: Tensor, documents: Tensor, facts: TrainingFacts) -> Consume:
        """What makes the loss of the last hidden states, in the model's head."""
        raise NotImplementedError

    def further(self, model: nn.Module, facts: TrainingFacts) -> Further:
        """What makes the states that it gets beside them."""
        return nothing_further

    def n_read(self, targets: Tensor, documents: Tensor) -> int:
        """How many tokens of these rows, both (B, T), are text that is learned from, as throughput counts them."""
        return int((targets != IGNORE).sum())

    def loss_weights(self, total: Callable[..., list[float]], batches: Counted, n_targets: float) -> tuple[float, ...]:
        """`TrainingFacts.loss_weights` of a step of `n_targets` targets; `total` sums numbers over the ranks."""
        return ()

    def validation(self, cross_entropy: CrossEntropy) -> Validation:
        """What tells on other text how good the model has become; `cross_entropy` is without additions."""
        raise NotImplementedError


class Validation(Objective):
    """An objective that is only looked at: the summed next-token loss, and maybe other numbers."""

    def numbers(self, total: Total) -> dict[str, float]:
        """{name: number} over all calls since the last time; `total` sums over ranks. Collective."""
        return {}
