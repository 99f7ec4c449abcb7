"""Next-token prediction."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from titan_lite.models.context import NOT_TRAINING, Memory, TrainingFacts
from titan_lite.models.row import WHOLE, Row
from titan_lite.objectives.cross_entropy import CrossEntropy


class LanguageModeling:
    """The summed loss of a micro-batch's targets."""

    def __init__(self, cross_entropy: CrossEntropy, row: Row = WHOLE):
        """`row`: what this rank computes of the loss of each row."""
        self.cross_entropy, self.row = cross_entropy, row

    def __call__(
        self,
        model: nn.Module,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor,
        facts: TrainingFacts = NOT_TRAINING,
        memory: Memory | None = None,
    ) -> Tensor:
        """tokens, targets, documents (B, T) -> scalar sum over this rank's targets that are not -100."""
        consume = partial(self.cross_entropy, targets=self.row.own(targets))
        return model(tokens, documents, memory, facts, consume=consume, row=self.row)
