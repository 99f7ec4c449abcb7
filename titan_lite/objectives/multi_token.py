"""Next-token prediction, and beside it that of tokens further ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.data.batch import IGNORE
from titan_lite.models.context import TrainingFacts
from titan_lite.models.head.lm import Consume
from titan_lite.models.head.output import Output
from titan_lite.models.mtp import MTP, Further, nothing_further
from titan_lite.models.row import WHOLE, Row
from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import CrossEntropy, Part
from titan_lite.objectives.lm import LanguageModeling
from titan_lite.objectives.objective import Counted, Objective


class MultiTokenPrediction(LanguageModeling):
    """The summed loss of a micro-batch's targets; backward minimises those of the model's `mtp` along with it.

    `facts.loss_weights` has their weights; without any they are left out. The model is told what their losses were.
    """

    def __init__(
        self,
        config: Objective.Config,
        cross_entropy: CrossEntropy,
        row: Row = WHOLE,
        weights: Sequence[float] = (),
    ):
        """`weights`: of the mean losses, those of the nearest tokens first."""
        super().__init__(config, cross_entropy, row)
        self.weights = weights

    def consuming(self, model: nn.Module, targets: Tensor, documents: Tensor, facts: TrainingFacts) -> Consume:
        if not facts.loss_weights:
            return super().consuming(model, targets, documents, facts)
        further = [self.row.own(targets_ahead(targets, documents, k)) for k in range(1, 1 + len(facts.loss_weights))]

        def consume(x: Tensor, output: Output, *states: Tensor) -> Tensor:
            others = (Part(*part) for part in zip(states, further, facts.loss_weights, strict=True))
            loss, *losses = self.cross_entropy.first_of([Part(x, self.row.own(targets)), *others], output)
            mtp_of(model).tell(losses, [(of_k != IGNORE).sum() for of_k in further])
            return loss

        return consume

    def further(self, model: nn.Module, facts: TrainingFacts) -> Further:
        return mtp_of(model) if facts.loss_weights else nothing_further

    def loss_weights(self, total: Callable[..., list[float]], batches: Counted, n_targets: float) -> tuple[float, ...]:
        """Those of sums, where the sum over the `n_targets` targets of the global batch counts 1."""
        counts = [0] * len(self.weights)
        for targets, documents in batches:
            for k in range(1, 1 + len(self.weights)):
                counts[k - 1] += int((targets_ahead(targets, documents, k) != IGNORE).sum())
        return tuple(w * n_targets / max(n, 1) for w, n in zip(self.weights, total(*counts), strict=True))


def mtp_of(model: nn.Module) -> MTP:
    """What predicts further tokens."""
    assert isinstance(model, Transformer)
    return model.mtp


def targets_ahead(targets: Tensor, documents: Tensor, k: int) -> Tensor:
    """(B, T): the token k places behind each target, if it is in the row and in the document of the input, or IGNORE.

    The document of a row's last target is not known: it counts to that of the token before it.
    """
    ahead = F.pad(targets[:, k:], (0, k), value=IGNORE)
    of_targets = torch.cat((documents[:, 1:], documents[:, -1:]), dim=1)
    same = F.pad(of_targets[:, k:], (0, k), value=-1) == documents
    return ahead.where(same, IGNORE)
