"""Rotary position embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.context import Context, LayerMemory, n_positions
from titan_lite.models.position.base import Position
from titan_lite.models.position.frequencies import FREQUENCIES, Kind
from titan_lite.models.position.rotation import Layout, rotation
from titan_lite.models.position.scaling import NoScaling, Scaling

Direction: TypeAlias = Literal["forward", "reversed"]


def counted_up(positions: Tensor, length: int) -> Tensor:
    """t of positions in a text of `length` tokens: the positions themselves."""
    return positions


def counted_down(positions: Tensor, length: int) -> Tensor:
    """t that is 0 at the newest token and grows towards the oldest."""
    return length - 1 - positions


DIRECTIONS: dict[Direction, Callable[[Tensor, int], Tensor]] = {"forward": counted_up, "reversed": counted_down}


class Anew(NamedTuple):
    """What turns the tokens of a call where keys are remembered as they are, and all of them turned in each call."""

    queries: Any
    keys: Any
    length: int
    """Positions in all."""


class RoPE(Position):
    """Rotates pair j of each query and key at position t by t * f_j, f_j = theta^(-2j/d), of a head's first d numbers.

    Angles are in float32. Source: arXiv 2104.09864; rotating a part: arXiv 2204.06745 (GPT-NeoX); reversed:
    LSWTransformer (github.com/Avelina9X/memory-transformer-pt4).
    """

    class Config(Position.Config):
        type: Literal["rope"] = "rope"
        theta: PositiveFloat = 10000.0
        """Base of the frequencies."""
        fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Part of each head that is rotated: its first d = int(fraction * head_dim) numbers."""
        layout: Layout = "half_split"
        """What is a pair: numbers j and j + d/2, or the neighbours 2j and 2j + 1."""
        direction: Direction = "forward"
        """Positions count up from the first token, or (`reversed`) from the newest one backwards."""
        frequencies: Kind = "fixed"
        """`learned`: each layer has a factor of its own for every frequency."""
        scaling: Scaling.Config = NoScaling.Config()
        """Change of the frequencies, for texts longer than those of the training."""

        def width(self, head_dim: int) -> int:
            """How many numbers of a head are rotated."""
            return int(self.fraction * head_dim + 1e-6)  # 0.58 * 100 is a little less than 58

        def moves(self) -> bool:
            """Whether the angle of a token changes when tokens follow it."""
            return self.direction == "reversed" or self.scaling.moves()

        def build(self, *args: Any, **sizes: Any) -> RoPE:
            return (MovingRoPE if self.moves() else RoPE)(self, *args, **sizes)

        def score_factor(self) -> float:
            return self.scaling.score_factor()

        def head_problems(self, head_dim: int) -> Iterable[Problem]:
            width = self.width(head_dim)
            if width > 0 and width % 2 == 0:
                for problem in self.scaling.rotation_problems(self.theta, width):
                    yield replace(problem, key=f".position.scaling{problem.key}")
            elif self.fraction == 1 or head_dim < 2:
                why = "rotary positions turn pairs of a head's numbers, so its width must be even"
                yield Problem(CROSS_FIELD, ".head_dim", why, head_dim, "an even number")
            else:
                why = f"of head_dim = {head_dim} leaves {width} numbers to rotate, but they are turned in pairs"
                allowed = (
                    f"a fraction that leaves an even number, such as {_fraction_of_pairs(self.fraction, head_dim)}"
                )
                yield Problem(CROSS_FIELD, ".position.fraction", why, self.fraction, allowed)

    def __init__(self, config: Config, n_heads: int, head_dim: int):
        super().__init__()
        width = config.width(head_dim)
        self.times = DIRECTIONS[config.direction]
        self.scaling: Scaling = config.scaling.build(theta=config.theta, width=width)
        self.frequencies = FREQUENCIES[config.frequencies](self.scaling, width)
        self.width, self.rotate = width, rotation(config.layout, width, head_dim)
        self.key = f"rope {head_dim} {config.model_dump_json()}"

    def prepare(self, context: Context) -> Any:
        """What turns the tokens of this call: cos and sin, each (T, d/2), unless frequencies are learned."""
        if context.memory.plain_keys:
            return self.anew(context)
        length = context.length
        return self.turns(length, self.scaling.frequencies(length, context.positions.device), context.positions)

    def anew(self, context: Context) -> Anew:
        """What turns the queries of this call, and what turns all keys so far."""
        length, keys = n_positions(context.length, context.recalled), context.all_key_positions
        frequencies = self.scaling.frequencies(length, keys.device)
        queries = self.turns(length, frequencies, context.positions)
        return Anew(queries, self.turns(length, frequencies, keys), length)

    def turns(self, length: int, frequencies: Tensor, positions: Tensor) -> Any:
        """What turns the tokens at `positions` in a text of `length` tokens."""
        times = self.times(positions, length).to(torch.float32)
        return self.frequencies.prepare(torch.outer(times, frequencies), length)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, prepared: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(prepared, Anew):
            keys, values = memory.extend(k, v)
            q = self.rotate(q, *self.frequencies(prepared.queries, prepared.length))
            return q, self.rotate(keys, *self.frequencies(prepared.keys, prepared.length)), values
        cos, sin = self.frequencies(prepared, k.shape[2])
        return self.rotate(q, cos, sin), *memory.extend(self.rotate(k, cos, sin), v)

    def resting(self, k: Tensor, length: int) -> Tensor:
        turned, rest = k.split((self.width, k.shape[-1] - self.width), dim=-1)
        return torch.cat((turned * self.scaling.size(length), rest), dim=-1)


class MovingRoPE(RoPE):
    """Rotary positions that change as the text grows: keys are remembered as they are, and all of them are rotated."""

    def prepare(self, context: Context) -> Anew:
        return self.anew(context)


def _fraction_of_pairs(fraction: float, head_dim: int) -> float:
    """The nearest fraction of heads of this width that leaves an even number, and not none."""
    return max(2, 2 * round(fraction * head_dim / 2)) / head_dim
