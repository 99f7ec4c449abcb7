"""Attention in heads: the choices that do not depend on how queries, keys and values are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveFloat, PositiveInt, Probability
from titan_lite.models.attention.base import Attention
from titan_lite.models.attention.gate import Gate, NoGate
from titan_lite.models.attention.kernel import Auto, Kernel, PreparedKernel, Scoring
from titan_lite.models.attention.kernel.base import WASTE, hides_some
from titan_lite.models.attention.mask import Causal, Mask
from titan_lite.models.attention.registers import NoRegisters, Registers
from titan_lite.models.attention.score import Score, Softmax
from titan_lite.models.attention.sink import NoSink, Sink
from titan_lite.models.linear import Linear
from titan_lite.models.position import Position, RoPE
from titan_lite.parallel.deal import METHOD, attention_problems, takes_rings
from titan_lite.parallel.plan import split_problems

if TYPE_CHECKING:
    from titan_lite.job import Job


class Kept(NamedTuple):
    """Shapes of what a memory keeps of one token: it takes them as keys and values, which they need not be."""

    k: tuple[int, int]
    """Heads and their width."""
    v: tuple[int, int]


class HeadAttention(Attention):
    """H heads with weights of their own, which a kernel computes from queries, keys and masks.

    A subclass makes queries, keys and values, and ends its `__init__` with `attend_with`.
    """

    n_heads: int
    registers: Registers
    position: Position
    kernel: Kernel

    class Config(Attention.Config):
        n_heads: PositiveInt = 8
        """Query heads H."""
        scale: Literal["inverse_sqrt", "inverse", "sqrt"] | PositiveFloat = "inverse_sqrt"
        """Factor of the scores: 1 / sqrt(Dh), 1 / Dh (muP), sqrt(Dh) (nGPT), or a number."""
        position: Position.Config = RoPE.Config()
        """Position encoding of queries and keys."""
        masks: Annotated[tuple[Mask.Config, ...], Field(strict=False, min_length=1)] = (Causal.Config(),)
        """What a query may see; all of them must allow it."""
        score: Score.Config = Softmax.Config()
        """From scores to the weights of the values."""
        dropout: Probability = 0.0
        """Probability with which a weight of a value is dropped."""
        registers: Registers.Config = NoRegisters.Config()
        """Learned keys and values that every query sees beside those of the tokens."""
        sink: Sink.Config = NoSink.Config()
        """What a query may attend to instead of any token."""
        gate: Gate.Config = NoGate.Config()
        """Gate on the heads' output."""
        kernel: Kernel.Config = Auto.Config()
        """What computes the attention."""

        def width(self, dim: int) -> int:
            """Width Dh of queries and keys in a model of this width."""
            raise NotImplementedError

        def value_width(self, dim: int) -> int:
            """Width Dv of values in a model of this width."""
            raise NotImplementedError

        def groups(self) -> int:
            """Key/value heads that the kernel computes with."""
            return self.n_heads

        def kept(self, dim: int) -> Kept:
            """What a token leaves in a cache, in a model of this width."""
            raise NotImplementedError

        def kept_heads(self, dim: int) -> str:
            """The key and value that say how many heads `kept` has, for messages."""
            raise NotImplementedError

        def score_scale(self, head_dim: int) -> float:
            """The factor of the scores as a number."""
            if isinstance(self.scale, str):
                return {"inverse_sqrt": head_dim**-0.5, "inverse": 1 / head_dim, "sqrt": head_dim**0.5}[self.scale]
            return self.scale

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if not any(isinstance(mask, Causal.Config) for mask in self.masks):
                yield Problem(
                    code=CROSS_FIELD,
                    key=".masks",
                    value=[mask.model_dump() for mask in self.masks],
                    why='lacks "causal": next-token training would see its targets',
                    allowed='a list with { type = "causal" }, and more masks if wanted',
                )
            yield from self.kernel.refusals(self, job.model.dim)
            yield from split_problems(job, ".n_heads", self.n_heads)
            yield from attention_problems(self, job)

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            if not takes_rings(job):
                yield from self.kernel.remarks(self, job.model.dim, job.training.seq_len)
            elif hides_some(self, job.training.seq_len):
                yield f'{METHOD} = "ring" {WASTE}; with "ulysses", kernels that leave them out do so'

    def attend_with(self, config: Config, dim: int, linear: Linear.Config, turned: int, kept: Kept) -> None:
        """Makes the parts that the config chooses.

        `turned` numbers of each query and key are what positions act on; `kept` are the shapes that registers have too.
        """
        width, value_width, self.n_heads = config.width(dim), config.value_width(dim), config.n_heads
        self.position = config.position.build(n_heads=self.n_heads, head_dim=turned)
        (n_kv_heads, key_width), (_, kept_value_width) = kept
        shapes = {"n_kv_heads": n_kv_heads, "head_dim": key_width, "value_dim": kept_value_width}
        self.registers = config.registers.build(**shapes)
        self.scoring = Scoring(
            scale=config.score_scale(width),
            masks=tuple(mask.build() for mask in config.masks),
            bias=self.position.bias,
            score=config.score.build(),
            dropout=config.dropout,
            registers=self.registers.n,
        )
        self.kernel = config.kernel.build_for(config, dim, self.scoring)
        self.sink = config.sink.build(n_heads=self.n_heads)
        self.gate = config.gate.build(dim=dim, n_heads=self.n_heads, value_dim=value_width, linear=linear)
        self.flops_per_score = 2 * self.n_heads * (width + value_width)

    def shared(self) -> Iterator[Position | PreparedKernel]:
        yield self.position
        yield self.kernel

    def key_value_flops_per_token(self) -> int:
        """Forward FLOPs of what a cache keeps of one token."""
        raise NotImplementedError

    def score_flops_per_token(self, seq_len: int) -> int:
        return self.flops_per_score * (self.registers.n + seq_len)


def undivided(n_heads: int, dim: int) -> Problem:
    """Heads that do not divide the model's width, where theirs is not given."""
    why = f"must divide model.dim ({dim}) where head_dim is not given"
    return Problem(CROSS_FIELD, ".n_heads", why, n_heads, "a divisor of model.dim, or set head_dim")
