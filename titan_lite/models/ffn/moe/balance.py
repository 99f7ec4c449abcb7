"""What keeps experts equally busy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.ffn.moe.router import Routing
from titan_lite.models.ffn.moe.tally import counts
from titan_lite.models.module import Module
from titan_lite.models.row import Row

if TYPE_CHECKING:
    from titan_lite.job import Job


class Balance(Module):
    """A loss on the routing of a micro-batch, beside the objective.

    With tensor and context parallelism each rank has tokens of its own of every row, and the losses of the ranks are
    added up.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "balance"

    def loss(self, routing: Routing, n_rows: int, row: Row) -> Tensor:
        """Summed over tokens; the N = n_rows * T tokens of the routing are this rank's of each row, one row after the
        other."""
        raise NotImplementedError


class SequenceBalance(Balance):
    """coefficient * sum over rows of T * sum_i f_i P_i: f_i = E / (k T) * tokens of the row that chose expert i, P_i
    its mean probability in the row.

    Each row is balanced by itself, so the loss adds up over micro-batches and ranks, as a loss over the whole batch
    does not. Source: arXiv 2412.19437, equations 17-20 (DeepSeek-V3).
    """

    class Config(Balance.Config):
        type: Literal["sequence"] = "sequence"
        coefficient: PositiveFloat = 1e-2
        """Weight beside the cross entropy."""

    def __init__(self, config: Config):
        super().__init__()
        self.coefficient = config.coefficient

    def loss(self, routing: Routing, n_rows: int, row: Row) -> Tensor:
        E, k = routing.scores.shape[-1], routing.experts.shape[-1]
        own = len(routing.experts) // n_rows
        T = own * self.ranks.size * row.size
        chosen = row.sum(self.ranks.sum_alike(counts(routing.experts.view(n_rows, own * k), E)))  # (rows, E)
        mean = routing.probabilities().unflatten(0, (n_rows, own)).sum(1) / T  # (rows, E), this rank's share of it
        return self.coefficient * T * (chosen * (E / (k * T)) * mean).sum()


class BatchBalance(Balance):
    """coefficient * N * sum_i f_i P_i over all tokens of a micro-batch, f and P as in `SequenceBalance`.

    Depends on how the global batch is cut into micro-batches: other layouts train a little differently.
    Source: arXiv 2101.03961, equations 4-6 (Switch Transformer).
    """

    class Config(Balance.Config):
        type: Literal["micro_batch"] = "micro_batch"
        coefficient: PositiveFloat = 1e-2
        """Weight beside the cross entropy."""

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            yield '.type = "micro_batch" depends on training.local_batch_size: other layouts train a little differently'

    def __init__(self, config: Config):
        super().__init__()
        self.coefficient = config.coefficient

    def loss(self, routing: Routing, n_rows: int, row: Row) -> Tensor:
        E, k = routing.scores.shape[-1], routing.experts.shape[-1]
        chosen = row.sum(self.ranks.sum_alike(counts(routing.experts.flatten()[None], E)[0]))  # (E,)
        mean = routing.probabilities().mean(0) / (self.ranks.size * row.size)  # this rank's share of it
        return self.coefficient * (chosen * (E / k) * mean).sum()


class RouterZLoss(Balance):
    """coefficient * sum over tokens of logsumexp(logits)^2: keeps logits small. Source: arXiv 2202.08906 (ST-MoE)."""

    class Config(Balance.Config):
        type: Literal["z_loss"] = "z_loss"
        coefficient: PositiveFloat = 1e-3
        """Weight beside the cross entropy."""

    def __init__(self, config: Config):
        super().__init__()
        self.coefficient = config.coefficient

    def loss(self, routing: Routing, n_rows: int, row: Row) -> Tensor:
        return self.coefficient * routing.logits.logsumexp(-1).square().sum()
