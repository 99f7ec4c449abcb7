"""How a run was made where that is not how this project trains: for estimates of what others published.

A recipe is code of torch that another trainer calls and this one does not; nothing in it is a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from estimation.compiled import Graphs, Region
from estimation.instead import instead
from estimation.world import FakeWorld
from titan_lite.models.context import TrainingFacts
from titan_lite.models.embedding.base import Embedding
from titan_lite.models.embedding.lookup import Lookup
from titan_lite.models.head.lm import all_logits
from titan_lite.models.ranks import Ranks
from titan_lite.models.transformer import Transformer
from titan_lite.objectives.objective import Objective
from titan_lite.parallel.plan import SEQ
from titan_lite.parallel.world import LossOf
from titan_lite.step import Training

if TYPE_CHECKING:
    from titan_lite.job import Job


class Recipe:
    """This project's own way."""

    one_graph = False
    """Whether the model is compiled as a whole, so that layers cannot be told apart."""

    @contextmanager
    def building(self) -> Iterator[None]:
        """Inside, a model is built and sharded."""
        yield

    def built(self, training: Training, job: Job, graphs: Graphs) -> Training:
        """What is run in place of what was built."""
        return training


class EndsInRoot(Recipe):
    """FSDP units are the blocks, and the whole model with embedding, last norm and head: gathered from the first use to
    the last, as this project does it with a tied embedding.
    """

    @contextmanager
    def building(self) -> Iterator[None]:
        tied = property(lambda model: True, lambda model, value: vars(model).update(tied=value))
        with instead(Transformer, tied=tied):
            yield


class PureBfloat16(EndsInRoot):
    """A public FSDP2 framework (KempnerForge): nothing rests in float32, and the loop is plain.

    Every unit is freed after forward, the root too. Gradients are not reduced before the last micro-batch, so each rank
    sums all of them, in the dtype of the reduction (float32; `set_requires_gradient_sync(False)`). Under tensor
    parallelism each rank has the whole embedding and gathers the whole logits. The loss is `F.cross_entropy` of
    bfloat16 logits, which a variable of the loop holds until the next ones are there. `torch.compile` takes the model,
    which is one graph where FSDP does not break it, that is on one device: its backward ends with all gradients.
    """

    def __init__(self, one_graph: bool):
        self.one_graph = one_graph

    @contextmanager
    def building(self) -> Iterator[None]:
        whole = instead(Embedding, tp_plan=lambda embedding: {"weight": SEQ}, split=_look_up_in_whole)
        with super().building(), whole:
            yield

    def built(self, training: Training, job: Job, graphs: Graphs) -> Training:
        model: Any = training.model
        if isinstance(model, FSDPModule):
            model.set_reshard_after_forward(True, recurse=False)
        if self.one_graph:
            model.forward = Region("model", "model", model.forward, model, graphs)
        world = cast(FakeWorld, training.world)
        plain = ReducedLast(**{each.name: getattr(world, each.name) for each in fields(world)})
        return replace(training, world=plain, objective=cast(Objective, HeldLogits()))


def _look_up_in_whole(embedding: Embedding, ranks: Ranks) -> None:
    super(Embedding, embedding).split(ranks)
    embedding.lookup = OwnTokens(ranks)


class OwnTokens(Lookup):
    """Every rank has all rows, and goes on with those of its tokens."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table).chunk(self.ranks.size, dim=1)[self.ranks.rank]


class ReducedLast(FakeWorld):
    """Gradients stay whole, unreduced, until the last micro-batch."""

    def forward_backward(self, model: Transformer, losses: Iterable[LossOf], last: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for index, loss_of in enumerate(losses):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(index == last)
            loss = loss_of(model)
            loss.backward()
            total += loss.detach()
        return total


class HeldLogits:
    """The summed loss of logits in the model's dtype, which are held until the next ones are there."""

    logits: Tensor

    def __call__(
        self, model: nn.Module, tokens: Tensor, targets: Tensor, documents: Tensor, facts: TrainingFacts, memory: Any
    ) -> Tensor:
        self.logits = model(tokens, documents, memory, facts, all_logits)
        return F.cross_entropy(self.logits.flatten(0, 1), targets.flatten(), reduction="sum")
