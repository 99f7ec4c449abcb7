"""A rank's part of a model, and the stages of which it consists. Names of parameters stay those of the whole model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from titan_lite.models.context import Context
from titan_lite.models.embedding import Embedding
from titan_lite.models.head import Head
from titan_lite.models.head.lm import Consume
from titan_lite.models.mtp import NoMTP
from titan_lite.models.norm import NoNorm
from titan_lite.models.ranks import Ranks
from titan_lite.models.stack import PlainStack, Streams
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.plan import Plan

if TYPE_CHECKING:
    from titan_lite.parallel.pipeline.plan import Copied, StagePlan
    from titan_lite.parallel.pipeline.run import Pipeline


class NoEmbedding(Embedding):
    """Of a stage that is given hidden states: the tokens, which nobody reads."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def tp_plan(self) -> Plan:
        return {}

    def split(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        return tokens


@cache
def _table_of(embedding: Any) -> type[Embedding]:
    """The class of the table alone of such an embedding, as a tied head on another stage reads it."""
    split = {"tp_plan": Embedding.tp_plan, "split": NoEmbedding.split, "forward": NoEmbedding.forward}
    return type(f"{embedding.__name__}Table", (embedding,), split)


class NoHead(Head):
    """Of a stage that gives hidden states to the next one: 0, its part of any loss."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor, embedding: Embedding, consume: Consume, further: Sequence[Tensor] = ()) -> Tensor:
        return x.new_zeros((), dtype=torch.float32)


class Section(PlainStack):
    """Some of the layers: takes what the stage before gave, and leaves what the next one is given."""

    arrived: Sequence[Tensor] = ()
    """The stream (B, T, D), then what `arriving` names."""
    left: tuple[Tensor, ...] = ()
    """The same for the next stage, in the order of names."""

    def __init__(self, blocks: nn.ModuleDict, layers: range, arriving: Sequence[str]):
        """`arriving` are the names, in order, of what layers of other stages leave for those of this one."""
        nn.Module.__init__(self)
        self.executed, self.arriving = layers, arriving
        self.blocks = nn.ModuleDict({str(number): blocks[str(number)] for number in layers})

    def forward(self, x: Tensor, context: Context) -> Streams:
        stream, *others = self.arrived
        carry = dict(zip(self.arriving, others, strict=True))
        return self.leave(super().forward(stream, context._replace(carry=carry)))

    def leave(self, streams: Streams) -> Streams:
        """Puts down what the next stage is given."""
        # What arrived may be passed on as it is, and autograd would then have one tensor for input and output.
        carried = (tensor.clone(memory_format=torch.contiguous_format) for _, tensor in sorted(streams.carry.items()))
        self.left = (streams.x.contiguous(), *carried)
        return streams


class FirstSection(Section):
    """The first layers, which read the embedding."""

    def forward(self, x: Tensor, context: Context) -> Streams:
        return self.leave(PlainStack.forward(self, x, context))


class StageModel(Transformer):
    """A stage: a model of some of the layers, with null parts in the place of those that other stages have.

    Its forward is that of any model; what it returns is its part of the loss, and what it leaves lies in its stack.
    """

    stack: Section

    def __init__(self, part: PipelinedTransformer, stage: int, plan: StagePlan, arriving: Sequence[str]):
        nn.Module.__init__(self)
        of_part = vars(part).items()
        vars(self).update({name: value for name, value in of_part if name not in vars(self) and name != "_stages"})
        first, last = stage == 0, stage == plan.n_stages - 1
        embeds = first or (last and plan.rank_of[0] != plan.rank_of[-1])
        self.embedding = part.embedding if embeds else NoEmbedding()
        section = FirstSection if first else Section
        self.stack = section(part.stack.blocks, plan.layers[stage], arriving)
        self.norm, self.mtp, self.head = (part.norm, part.mtp, part.head) if last else null_ends()
        self.summaries = part.summaries
        self.find_shared()

    def unit_order(self) -> Iterator[nn.Module]:
        return (unit for unit in super().unit_order() if next(unit.parameters(), None) is not None)


def null_ends() -> tuple[nn.Module, NoMTP, NoHead]:
    """Norm, predictors and head of a stage that is not the last one."""
    none: Any = None
    return NoNorm(NoNorm.Config(), 0), NoMTP(NoMTP.Config(), 0, none, none), NoHead()


class PipelinedTransformer(Transformer):
    """A rank's part of a model: what it holds, under the names of the whole. Its stages run it.

    Outside training a forward goes through the stages of all ranks, each of which calls it alike; the last one's rank
    returns what `consume` made, and the others 0: their sum is what a model returns.
    """

    pipeline: Pipeline
    """What runs the stages."""
    has_copies: bool = False
    """Whether the embedding is a copy of the first stage's."""
    _stages: Sequence[StageModel] = ()

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return self.pipeline.relay(args, options)

    @property
    def stages(self) -> Sequence[Transformer]:
        return self._stages

    def cut(self, plan: StagePlan, numbers: Sequence[int], arriving: Sequence[Sequence[str]]) -> None:
        """Makes the stages, once the modules are those that will run; `arriving` has the names for each of all."""
        self._stages = tuple(StageModel(self, number, plan, arriving[number]) for number in numbers)

    def train(self, mode: bool = True) -> PipelinedTransformer:
        for stage in self.stages:
            stage.train(mode)
        super().train(mode)
        return self

    def copies(self) -> set[nn.Parameter]:
        return set(self.embedding.parameters()) if self.has_copies else set()


def divide(model: Transformer, plan: StagePlan, rank: int, copied: Copied) -> PipelinedTransformer:
    """Leaves of a model on the meta device what `rank` holds, in place.

    `copied` is what of the embedding the last stage has too.
    """
    mine = plan.stages_of(rank)
    layers = {str(number) for stage in mine for number in plan.layers[stage]}
    for number in set(model.stack.blocks) - layers:
        del model.stack.blocks[number]
    has_first, has_last = 0 in mine, plan.n_stages - 1 in mine
    model.__class__ = PipelinedTransformer
    assert isinstance(model, PipelinedTransformer)
    model.has_copies = has_last and not has_first and copied != "nothing"
    if model.has_copies and copied == "table":
        _keep_table(model.embedding)
    elif not has_first and not model.has_copies:
        model.embedding = NoEmbedding()
    if not has_last:
        model.norm, model.mtp, model.head = null_ends()
    model.find_shared()
    return model


def _keep_table(embedding: Embedding) -> None:
    for name in list(embedding._modules):
        delattr(embedding, name)
    embedding.__class__ = _table_of(cast(Hashable, type(embedding)))
