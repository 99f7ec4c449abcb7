"""Rules of the parts that architectures share: norms, projections of the attention, matrices with a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from titan_lite.hf.rope import row_order
from titan_lite.hf.rule import (
    SAME,
    Rule,
    Transform,
    completed,
    constant,
    each,
    joined_by_group,
    opposite,
    reordered,
    times,
)
from titan_lite.models.attention import Attention, GroupedAttention
from titan_lite.models.attention.fused import FusedGQA

Kind = Literal["weight", "bias"]


def pair(ours: str, theirs: str, transform: Transform = SAME) -> Rule:
    """One tensor of each."""
    return Rule((ours,), (theirs,), transform)


def norm(ours: str, theirs: str, config: Any, image: Any, dim: int, gain: Transform = SAME) -> Iterator[Rule]:
    """A norm of width `dim`; `gain` is what becomes of gains that start at 1."""
    if getattr(image, "gain", "none") == "vector":
        names = (f"{ours}.weight",) if config.gain == "vector" else ()
        yield Rule(names, (f"{theirs}.weight",), gain if names else constant(1.0, dim) >> gain)
    if getattr(image, "bias", False):
        names = (f"{ours}.bias",) if config.bias else ()
        yield Rule(names, (f"{theirs}.bias",), SAME if names else constant(0.0, dim))


def linear(
    ours: str, theirs: str, bias: bool, their_bias: bool, width: int, transform: Transform = SAME
) -> Iterator[Rule]:
    """A matrix, changed by `transform`, and its bias of `width` numbers where the architecture has one."""
    yield pair(f"{ours}.weight", f"{theirs}.weight", transform)
    if their_bias:
        names = (f"{ours}.bias",) if bias else ()
        yield Rule(names, (f"{theirs}.bias",), SAME if names else constant(0.0, width))


class Heads:
    """Queries, keys and values of one layer, as an architecture without our liberties computes them."""

    def __init__(self, config: Attention.Config, image: Attention.Config, dim: int):
        assert isinstance(config, GroupedAttention.Config)
        assert isinstance(image, GroupedAttention.Config)
        self.config = config
        self.width = config.width(dim)
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        order = row_order(config.position, self.width)
        self.order = reordered(order)
        """What becomes of numbers that belong to the entries of one head or of several."""
        factor = config.score_scale(self.width) / image.score_scale(self.width)
        self.queries = self.order >> times(1.0 if abs(factor - 1) < 1e-12 else factor)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        return self.n_heads * self.width, self.n_kv_heads * self.width, self.n_kv_heads * self.width

    def names(self, ours: str, kind: Kind) -> tuple[str, ...]:
        """Our tensors of a kind that make q, k and v."""
        if self._is_fused():
            return (f"{ours}.qkv.{kind}",) if kind == "weight" or "q" in self.config.bias else ()
        return tuple(f"{ours}.{p}.{kind}" for p in "qkv" if kind == "weight" or p in self.config.bias)

    def transform(self, kind: Kind) -> Transform:
        """From those to q, k and v, one below the other for each, with zeros for a bias that we do not have."""
        if self._is_fused() and self.names("", kind):
            group = self.n_heads // self.n_kv_heads * self.width
            split = opposite(joined_by_group(self.n_kv_heads, group, self.width, self.width))
        else:
            split = completed(tuple(kind == "weight" or p in self.config.bias for p in "qkv"), self.sizes)
        return split >> each(self.queries, self.order, SAME)

    def rules(self, ours: str, theirs: tuple[str, str, str], their_bias: bool) -> Iterator[Rule]:
        """Those of an architecture that has a matrix for each, and for each a bias or for none."""
        kinds: tuple[Kind, ...] = ("weight", "bias") if their_bias else ("weight",)
        for kind in kinds:
            yield Rule(self.names(ours, kind), tuple(f"{name}.{kind}" for name in theirs), self.transform(kind))

    def _is_fused(self) -> bool:
        return isinstance(self.config, FusedGQA.Config)
