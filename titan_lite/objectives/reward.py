"""Rewards that put the better of two texts first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem, show
from titan_lite.config.fields import NonNegativeFloat
from titan_lite.models.context import TrainingFacts
from titan_lite.models.head.lm import Consume, Head
from titan_lite.models.head.output import Output
from titan_lite.models.module import Total
from titan_lite.models.row import WHOLE, Row
from titan_lite.objectives.cross_entropy import CrossEntropy
from titan_lite.objectives.objective import Counted, Objective, Validation

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.transformer import Transformer


def separable(chosen: Tensor, rejected: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) ln s(r_w) - e ln s(-r_w) - e ln s(r_l) - (1 - e) ln s(-r_l): least at r_w = -r_l = ln((1 - e) / e)."""
    better = (1 - smoothing) * F.logsigmoid(chosen) + smoothing * F.logsigmoid(-chosen)
    worse = smoothing * F.logsigmoid(rejected) + (1 - smoothing) * F.logsigmoid(-rejected)
    return -better - worse


def contrastive(chosen: Tensor, rejected: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) ln s(r_w - r_l) - e ln s(r_l - r_w): least at r_w - r_l = ln((1 - e) / e)."""
    margin = chosen - rejected
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


LOSSES: Final[dict[str, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "separable": separable,
    "contrastive": contrastive,
}
"""By name: from the rewards r_w of better texts and r_l of worse ones, both (P,), and e to the loss of each pair."""


class RewardModeling(Objective):
    """The mean loss of pairs of texts by their rewards, plus `lm_weight` times the next-token loss of better answers.

    Logits are not part of it: they change only as far as the states that both heads read do. Source: arXiv 2405.20053
    (Direct Preference Heads, both losses); arXiv 2203.02155, equation 1 (the contrastive one without smoothing).
    """

    class Config(Objective.Config):
        type: Literal["reward"] = "reward"
        reads_pairs: ClassVar[bool] = True
        loss: Literal["separable", "contrastive"] = "separable"
        """Whether each reward is pushed to its own side of 0, or the two of a pair apart."""
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
        """Part e of the pairs that are taken to be labelled the wrong way round."""
        lm_weight: NonNegativeFloat = 0.0
        """Weight of the mean next-token loss of the chosen answers; 0 = that head is neither run nor trained."""

        @property
        def logits_per_token(self) -> float:
            """Of the better texts' half, if at all."""
            return 0.5 if self.lm_weight else 0.0

        def freeze(self, model: Transformer) -> None:
            if not self.lm_weight:
                model.head.requires_grad_(False)
                model.head.reward.requires_grad_(True)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            yield from _problems(self, job)

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            if job.training.z_loss and not self.lm_weight:
                why = "it is a part of the next-token loss, and objective.lm_weight is 0"
                yield f"training.z_loss = {show(job.training.z_loss)} has no effect: {why}"

    config: Config

    def __init__(self, config: Config, cross_entropy: CrossEntropy, row: Row = WHOLE):
        super().__init__(config, cross_entropy, row)
        assert row.size == 1, "both texts of a pair are whole"
        self.pair_loss = LOSSES[config.loss]
        self.next_tokens = self._next_tokens if config.lm_weight else nothing_beside

    def consuming(self, model: nn.Module, targets: Tensor, documents: Tensor, facts: TrainingFacts) -> Consume:
        """Rows (B, T) come in pairs, the better text first, each from the row's beginning on as document 0."""
        (weight,) = facts.loss_weights or (1.0,)

        def consume(x: Tensor, output: Output) -> Tensor:
            chosen, rejected = rewards_of(output, documents)
            if torch.is_grad_enabled():
                assert isinstance(model.head, Head)
                model.head.reward.tell(chosen, rejected)
            of_pairs = weight * self.pair_loss(chosen, rejected, self.config.label_smoothing).sum()
            return of_pairs + self.next_tokens(x, output, targets)

        return consume

    def _next_tokens(self, x: Tensor, output: Output, targets: Tensor) -> Tensor:
        return self.config.lm_weight * of_better(self.cross_entropy, x, output, targets)

    def n_read(self, targets: Tensor, documents: Tensor) -> int:
        return n_of_texts(documents)

    def loss_weights(self, total: Callable[..., list[float]], batches: Counted, n_targets: float) -> tuple[float, ...]:
        """That of a pair, where each target counts 1."""
        (n_pairs,) = total(sum(len(targets) // 2 for targets, _ in batches))
        return (n_targets / n_pairs,)

    def validation(self, cross_entropy: CrossEntropy) -> Validation:
        return PairValidation(self.config, cross_entropy)


class PairValidation(Validation):
    """The summed next-token loss of the better answers; the numbers are those of the pairs' rewards."""

    def __init__(self, config: RewardModeling.Config, cross_entropy: CrossEntropy):
        super().__init__(config, cross_entropy)
        self.pair_loss, self.smoothing = LOSSES[config.loss], config.label_smoothing
        self._sums: Tensor | None = None

    def consuming(self, model: nn.Module, targets: Tensor, documents: Tensor, facts: TrainingFacts) -> Consume:
        """Rows as in training; a pair whose rows have no document 0 only fills the batch up."""

        def consume(x: Tensor, output: Output) -> Tensor:
            chosen, rejected = rewards_of(output, documents)
            losses = self.pair_loss(chosen, rejected, self.smoothing)
            seen = torch.stack((torch.ones_like(losses), losses, (chosen > rejected).float()))
            sums = seen.where(documents[::2, 0] == 0, 0.0).sum(1)
            self._sums = sums if self._sums is None else self._sums + sums
            return of_better(self.cross_entropy, x, output, targets)

        return consume

    def n_read(self, targets: Tensor, documents: Tensor) -> int:
        return n_of_texts(documents)

    def numbers(self, total: Total) -> dict[str, float]:
        """Mean loss of the pairs, and how often the better text has the higher reward."""
        n, loss, correct = total(torch.zeros(3) if self._sums is None else self._sums).tolist()
        self._sums = None
        return {"reward_loss": loss / n, "reward_accuracy": correct / n}


def rewards_of(output: Output, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of the better texts (P,) of pairs in rows (2 P, T), and of the worse ones."""
    chosen, rejected = output.rewards(ends_of(documents)).unflatten(0, (-1, 2)).unbind(1)
    return chosen, rejected


def of_better(cross_entropy: CrossEntropy, x: Tensor, output: Output, targets: Tensor) -> Tensor:
    """The summed next-token loss of the better texts, whose logits alone are made."""
    return cross_entropy(x[::2], output, targets[::2])


def nothing_beside(x: Tensor, output: Output, targets: Tensor) -> Tensor:
    """No next-token loss."""
    return x.new_zeros(())


def n_of_texts(documents: Tensor) -> int:
    """Tokens of both texts of all pairs, prompts included: what the model reads, but for the filling of rows."""
    return int((documents == 0).sum())


def ends_of(documents: Tensor) -> Tensor:
    """(B,): the place of the last token of each row's text, which is its document 0."""
    return (documents == 0).sum(1) - 1


def _problems(objective: RewardModeling.Config, job: Job) -> Iterable[Problem]:
    if not job.model.head.reward.scores:
        why = 'is "none", and objective.type = "reward" trains a reward head'
        yield Problem(CROSS_FIELD, "model.head.reward.type", why, "none", '"linear"')
    elif objective.loss == "contrastive" and getattr(job.model.head.reward, "bias", False):
        why = 'adds the same to both texts of a pair, of which objective.loss = "contrastive" sees the difference'
        yield Problem(CROSS_FIELD, "model.head.reward.bias", why, True, "false")
    training, layout = job.training, job.parallelism
    rows = {"training.local_batch_size": training.local_batch_size}
    if training.global_batch_size != -1:
        rows["training.global_batch_size"] = training.global_batch_size
    if job.validation.enable:
        rows["validation.local_batch_size"] = job.validation.local_batch_size
    if layout.pipeline_parallel_degree > 1:
        rows["parallelism.pipeline_parallel_microbatch_size"] = layout.pipeline_parallel_microbatch_size
    for key, value in rows.items():
        if value % 2:
            why = 'is odd, and with objective.type = "reward" each two rows are the texts of a pair'
            yield Problem(CROSS_FIELD, key, why, value, f"{value + 1}")
    refused = {
        "parallelism.context_parallel_degree": (layout.context_parallel_degree, 1, "each rank reads whole texts"),
        "model.memory.type": (_type(job.model.memory), "none", "nothing comes before the texts of a pair"),
        "model.mtp.type": (_type(job.model.mtp), "none", "its part of the model would not be trained"),
        "validation.dataset": (job.validation.dataset, "", "validation reads the held-out pairs of data.source"),
        "validation.dataset_path": (job.validation.dataset_path, "", "validation reads those of data.source"),
    }
    for key, (given, allowed, why) in refused.items():
        if given != allowed:
            yield Problem(CROSS_FIELD, key, f'does not go with objective.type = "reward": {why}', given, show(allowed))


def _type(table: SlotConfig) -> str:
    kind: str = table.model_dump()["type"]
    return kind
