"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from titan_lite.models.context import NOT_TRAINING, Memory, TrainingFacts
from titan_lite.models.row import WHOLE, Row
from titan_lite.objectives.cross_entropy import CrossEntropy
from titan_lite.objectives.objective import Objective, Validation

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.transformer import Transformer


class LanguageModeling(Validation):
    """Cross entropy of the next token, and of further ones where the model has an `mtp`. Source: arXiv 1706.03762."""

    class Config(Objective.Config):
        type: Literal["lm"] = "lm"

        def freeze(self, model: Transformer) -> None:
            model.head.reward.requires_grad_(False)

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            if job.model.head.reward.scores:
                yield 'model.head.reward is part of the model, and objective.type = "lm" does not train it'

    def __init__(self, config: Objective.Config, cross_entropy: CrossEntropy, row: Row = WHOLE):
        """`row`: what this rank computes of the loss of each row."""
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
        """tokens, targets, documents (B, T) -> scalar sum over this rank's targets that are not -100."""
        consume = partial(self.cross_entropy, targets=self.row.own(targets))
        return model(tokens, documents, memory, facts, consume=consume, row=self.row)

    def validation(self, cross_entropy: CrossEntropy) -> Validation:
        return LanguageModeling(LanguageModeling.Config(), cross_entropy, self.row)
