"""The modular transformer: embedding -> stack of blocks -> norm -> head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, SerializationInfo, field_serializer, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import CROSS_FIELD, ConfigError, Problem
from titan_lite.config.fields import Strings
from titan_lite.models import combinations
from titan_lite.models.attention import GQA, Attention
from titan_lite.models.block import Block, Layer, SequentialBlock
from titan_lite.models.context import NOT_TRAINING, Context, EarlyExit, Memory, NoMemory, TrainingFacts, key_positions
from titan_lite.models.embedding import Embedding, TokenEmbedding
from titan_lite.models.ffn import FFN, GLU
from titan_lite.models.head import Head, LMHead
from titan_lite.models.head.lm import Consume, all_logits
from titan_lite.models.init import Init, TruncatedNormal
from titan_lite.models.init.rules import init_problems
from titan_lite.models.layers import (
    LayerOverride,
    layer_notices,
    layer_problems,
    resolved_layers,
    tables_without,
    variants,
)
from titan_lite.models.linear import DefaultLinear, Linear
from titan_lite.models.memory import LaneMemory, NoLaneMemory
from titan_lite.models.module import Module
from titan_lite.models.mtp import MTP, Further, NoMTP, nothing_further
from titan_lite.models.norm import NoNorm, Norm, RMSNorm
from titan_lite.models.param_dtype import ParamDtype
from titan_lite.models.residual import PreNorm, Residual
from titan_lite.models.row import WHOLE, Row
from titan_lite.models.stack import PlainStack, Stack, Streams

if TYPE_CHECKING:
    from titan_lite.job import Job


class Transformer(Module):
    """Token ids (B, T) -> what `consume` makes of the last hidden states: by default logits (B, T, V)."""

    class Config(ConfigBase):
        name: str = ""
        """Preset this model starts from; empty = the defaults below."""
        flavor: str = ""
        """Size of the preset."""
        hf_assets_path: str = ""
        """Folder with the tokenizer files of a published model."""
        converters: Strings = ()
        """Conversions of the model's matrices (float8)."""
        print_after_conversion: bool = False
        """Print the model after the converters ran."""
        dim: Annotated[int, Field(gt=0)] = 256
        """Model width D."""
        n_layers: Annotated[int, Field(gt=0, le=100_000)] = 4
        """Layers L; executed ones, but with a recurrent stack distinct ones."""
        vocab_size: Annotated[int, Field(ge=0)] = 0
        """Rows of the embedding V; 0 = the tokenizer's, rounded up."""
        embedding: Embedding.Config = TokenEmbedding.Config()
        """From token ids to the residual stream."""
        stack: Stack.Config = PlainStack.Config()
        """Which block runs at which layer."""
        block: Block.Config = SequentialBlock.Config()
        """How the branches of a layer are arranged."""
        residual: Residual.Config = PreNorm.Config()
        """How a branch joins the residual stream."""
        norm: Norm.Config = RMSNorm.Config()
        """Every norm of the residual stream."""
        final_norm: Norm.Config | None = None
        """Before the head; not given = like `norm`, or none where the residual leaves the stream normalised."""
        attention: Attention.Config = GQA.Config()
        """The branch that mixes tokens."""
        ffn: FFN.Config = GLU.Config()
        """The branch that works on each token."""
        linear: Linear.Config = DefaultLinear.Config()
        """Every matrix."""
        memory: LaneMemory.Config = NoLaneMemory.Config()
        """What the rows of a training step remember of the steps before."""
        layers: Annotated[tuple[LayerOverride, ...], Field(strict=False)] = ()
        """What differs in some layers: tables merge over the model-wide ones and those of earlier entries for the same
        layer, arrays replace, and another `type` replaces its table."""
        head: Head.Config = LMHead.Config()
        """From hidden states to logits."""
        mtp: MTP.Config = NoMTP.Config()
        """What predicts tokens behind the next one, in training."""
        init: Init.Config = TruncatedNormal.Config()
        """Distribution of the initial weights."""
        param_dtype: ParamDtype = ParamDtype()
        """Types in which parameters are stored, where it is not training.dtype."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if self.flavor and not self.name:
                yield Problem(
                    code=CROSS_FIELD, key=".flavor", value=self.flavor, why="a flavor needs the preset in model.name"
                )
            if 0 < self.vocab_size < job.tokenizer.known_vocab_size:
                yield _too_small(self.vocab_size, job.tokenizer.known_vocab_size)
            yield from layer_problems(self, job, world_size)
            yield from combinations.problems(job)
            yield from init_problems(job)

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            yield from layer_notices(self, job, world_size)
            yield from combinations.notices(job)

        @model_validator(mode="after")
        def _layers_are_right(self) -> Self:
            variants(self)
            return self

        @field_serializer("layers")
        def _what_layers_are(self, _: Any, info: SerializationInfo) -> list[dict[str, Any]]:
            """Whole tables, so that a resolved config does not depend on defaults or on how it was written."""
            return resolved_layers(self, info.mode)

        def identity(self) -> dict[str, Any]:
            """What trained weights are for, as JSON: all but names, initial values, dropout and how it is computed."""
            tables: dict[str, Any] = tables_without(self.model_dump(mode="json"), _NOT_THE_MODEL)
            names = ("name", "flavor", "hf_assets_path")
            for key in (*names, "converters", "print_after_conversion", "param_dtype"):
                del tables[key]
            tables["stack"].pop("exit", None)
            tables["mtp"].pop("weight", None)
            tables["layers"] = resolved_layers(self, "json", without=_NOT_THE_MODEL)
            return tables

        def each_layer(self) -> list[Layer]:
            """The choices of each executed layer, in order."""
            by_number = {number: v.layer for v in variants(self) for number in v.numbers}
            return [by_number[number] for number in range(self.n_layers)]

        def last_norm(self) -> Norm.Config:
            """The norm before the head."""
            if self.final_norm is not None:
                return self.final_norm
            normalised = self.stack.normalises_stream or self.each_layer()[-1].residual.normalises_stream
            return NoNorm.Config() if normalised else self.norm

        def norm_behind_last_layer(self) -> Norm.Config:
            """The norm that would stand between a layer like the last one and the head."""
            if self.final_norm is not None and not self.stack.normalises_stream:
                return self.final_norm
            return NoNorm.Config() if self.each_layer()[-1].residual.normalises_stream else self.norm

        def depth(self) -> int:
            """Executed layers, on average."""
            return self.stack.depth(self.n_layers)

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = config.embedding.build(vocab_size=vocab_size, dim=config.dim, linear=config.linear)
        self.stack = config.stack.build(dim=config.dim, layers=config.each_layer())
        self.norm = config.last_norm().build(dim=config.dim)
        last: Layer = config.each_layer()[-1]
        self.mtp: MTP = config.mtp.build(dim=config.dim, layer=last, norm=config.norm_behind_last_layer())
        sizes = {"dim": config.dim, "vocab_size": vocab_size, "linear": config.linear}
        self.head = config.head.build(**sizes, embedding=self.embedding)
        self.tied = config.head.tied
        self.summaries = config.memory.statistics(config.dim)
        self.row = WHOLE
        self.find_shared()

    def find_shared(self) -> None:
        """Notes the parts of all attentions that compute something once per forward; anew where they were changed."""
        # A plain dict: these modules are registered where they belong, in their attentions.
        self._shared = {part.key: part for m in self.modules() if isinstance(m, Attention) for part in m.shared()}

    @property
    def stages(self) -> Sequence[Transformer]:
        """The models whose forwards make up this one's, each sharded by itself; with pipelines several, or others."""
        return (self,)

    def copies(self) -> set[nn.Parameter]:
        """Those parameters that are copies of another pipeline stage's, where they count."""
        return set()

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        memory: Memory | None = None,
        facts: TrainingFacts = NOT_TRAINING,
        consume: Consume = all_logits,
        agree: Callable[[int], int] | None = None,
        further: Further = nothing_further,
        row: Row = WHOLE,
    ) -> Tensor:
        """`agree` lets a recurrent stack stop early in decoding: it makes one decision of those of all ranks.

        `further` makes states that `consume` gets beside those of the next token: the model's `mtp` does.
        `row` is what this rank computes of all tokens, and so what `consume` gets: the model's `row`, or all of them.
        """
        context = self.context(tokens, documents, memory, facts, row)
        if agree is not None:
            context = context._replace(early_exit=EarlyExit(self._next_logits, agree))
        x = self.embedding(row.own(tokens), context)  # (B, T, D)
        streams: Streams = self.stack(x, context)
        context.memory.see(streams.x)
        states = further(x, streams, self.norm, context)
        return self.head(self.norm(streams.x), self.embedding, consume, states)

    def _next_logits(self, x: Tensor) -> Tensor:
        """Hidden states behind the stack (B, T, D) -> logits (B, V) of the next token."""
        logits: Tensor = self.head(self.norm(x[:, -1:]), self.embedding, all_logits)
        return logits[:, -1]

    def context(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        memory: Memory | None = None,
        facts: TrainingFacts = NOT_TRAINING,
        row: Row = WHOLE,
    ) -> Context:
        """What the blocks of one forward over `tokens` (B, T) are told."""
        memory = NoMemory() if memory is None else memory
        keys = torch.arange(memory.length, memory.length + tokens.shape[1], device=tokens.device)
        positions = row.own(key_positions(keys, memory.recalled), dim=0)
        noise = facts.noise
        if noise is not None and row.size > 1:
            noise = noise._replace(tokens=positions)
        context = Context(
            positions,
            documents,
            memory,
            noise,
            prepared={},
            carry={},
            token_weight=facts.token_weight,
            iterations=facts.iterations,
            first_key=memory.first_key(documents),
            recalled=memory.recalled,
            stream_positions=self.ranks.own(positions, self.training),
            row=row,
        )
        return context._replace(prepared={key: part.prepare(context) for key, part in self._shared.items()})

    def blocks(self) -> dict[str, nn.Module]:
        """All distinct blocks by their paths: what is checkpointed and compiled."""
        of_stack = {f"stack.blocks.{number}": block for number, block in self.stack.blocks.items()}
        return of_stack | {f"mtp.{path}": block for path, block in self.mtp.blocks().items()}

    def executed(self) -> list[str]:
        """The paths of blocks in the order in which a training forward runs them."""
        of_stack = [f"stack.blocks.{number}" for number in self.stack.executed]
        return of_stack + [f"mtp.{path}" for path in self.mtp.blocks()]

    def shard_units(self) -> Iterator[nn.Module]:
        """What is gathered together, in the order of the first use; other parameters belong to the model itself."""
        yield from dict.fromkeys(self.unit_order())

    def unit_order(self) -> Iterator[nn.Module]:
        """The units as a forward runs them; those of an iterated core as two iterations.

        A tied embedding is used at both ends, so it stays with the model, gathered from the first use to the last.
        """
        if not self.tied:
            yield self.embedding
        yield from self.stack.order()
        yield from self.mtp.units()
        if not self.tied:
            yield self.head


_NOT_THE_MODEL = ("kernel", "dropout", "init", "warm_start", "start", "change", "profile_batches")
"""Keys of any table that say how weights begin or how the same function is computed."""


def vocab_size_for(config: Transformer.Config, tokenizer_size: int) -> int:
    """Rows of the embedding: `model.vocab_size`, into which the tokenizer must fit, or the tokenizer's own rounded up.

    Rounded to a multiple of 64, which matrix kernels and tensor parallelism want.
    """
    if not config.vocab_size:
        return -(-tokenizer_size // 64) * 64
    if config.vocab_size < tokenizer_size:
        raise ConfigError([_too_small(config.vocab_size, tokenizer_size)])
    return config.vocab_size


def _too_small(vocab_size: int, tokenizer_size: int) -> Problem:
    return Problem(
        code=CROSS_FIELD,
        key="model.vocab_size",
        value=vocab_size,
        why=f"is smaller than the tokenizer's vocabulary of {tokenizer_size}",
        allowed=f"at least {tokenizer_size}, or 0 for the tokenizer's own size rounded up",
    )
