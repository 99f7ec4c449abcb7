"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from titan_lite.models.context import TrainingFacts
from titan_lite.models.head.lm import Consume
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

    def consuming(self, model: nn.Module, targets: Tensor, documents: Tensor, facts: TrainingFacts) -> Consume:
        """The sum over this rank's targets that are not -100."""
        return partial(self.cross_entropy, targets=self.row.own(targets))

    def validation(self, cross_entropy: CrossEntropy) -> Validation:
        return LanguageModeling(LanguageModeling.Config(), cross_entropy, self.row)
