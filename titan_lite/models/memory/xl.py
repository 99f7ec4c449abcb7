"""Transformer-XL: attention also sees the segment before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveInt
from titan_lite.models.attention import HeadAttention
from titan_lite.models.block import Layer
from titan_lite.models.context import Projects
from titan_lite.models.memory.base import LaneMemory, SlotMemory
from titan_lite.models.ranks import Ranks
from titan_lite.parallel.plan import DEGREE, degree, divisors

if TYPE_CHECKING:
    from titan_lite.job import Job


class KeptKeys(NamedTuple):
    """One layer's keys before their positions (B, G, C, Dh), and values (B, G, C, Dv). A `LayerMemory`."""

    k: Tensor
    v: Tensor

    def project(self, attention: Projects, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.project(x)

    def leave(self, x: Tensor, k: Tensor, v: Tensor, carry: dict[str, Tensor]) -> None:
        carry["memory.k"], carry["memory.v"] = k.detach(), v.detach()

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((self.k.to(k.dtype), k), dim=2), torch.cat((self.v.to(v.dtype), v), dim=2)

    def followed_by(self, carry: dict[str, Tensor]) -> KeptKeys:
        """What is kept once that is added which `leave` put into `carry`, where it is taken out."""
        return KeptKeys(newest(self.k, carry.pop("memory.k"), 2), newest(self.v, carry.pop("memory.v"), 2))

    def behind(self, others: Any) -> KeptKeys:
        """Others, of its own kind, and then these."""
        return KeptKeys(torch.cat((others.k, self.k), dim=2), torch.cat((others.v, self.v), dim=2))

    def last(self, n: int) -> KeptKeys:
        """Of the last n tokens."""
        return KeptKeys(self.k[:, :, -n:], self.v[:, :, -n:])

    def segments(self, chosen: Tensor, size: int) -> KeptKeys:
        """Of those segments of `size` tokens, numbered from the oldest, that each row chose (B, m)."""
        k, v = (segments_of(x.transpose(1, 2), chosen, size).transpose(1, 2) for x in self)
        return KeptKeys(k, v)


class KeptInputs(NamedTuple):
    """The inputs of one layer's attention (B, C, D), from which keys and values are made anew. A `LayerMemory`."""

    x: Tensor

    def project(self, attention: Projects, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.project_beside(x, self.x.to(x.dtype))

    def leave(self, x: Tensor, k: Tensor, v: Tensor, carry: dict[str, Tensor]) -> None:
        carry["memory.x"] = x.detach()

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def followed_by(self, carry: dict[str, Tensor]) -> KeptInputs:
        """As of `KeptKeys`."""
        return KeptInputs(newest(self.x, carry.pop("memory.x"), 1))

    def behind(self, others: Any) -> KeptInputs:
        """As of `KeptKeys`."""
        return KeptInputs(torch.cat((others.x, self.x), dim=1))

    def last(self, n: int) -> KeptInputs:
        """As of `KeptKeys`."""
        return KeptInputs(self.x[:, -n:])

    def segments(self, chosen: Tensor, size: int) -> KeptInputs:
        """As of `KeptKeys`."""
        return KeptInputs(segments_of(self.x, chosen, size))


Kept: TypeAlias = KeptKeys | KeptInputs


class Recalled(NamedTuple):
    """What one layer keeps of tokens from afar, and of those just before this call's. A `LayerMemory`."""

    far: Kept
    near: Kept

    def joined(self) -> Kept:
        """Both, made in the block: a checkpoint keeps views of what is kept anyway."""
        return self.near.behind(self.far)

    def project(self, attention: Projects, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.joined().project(attention, x)

    def leave(self, x: Tensor, k: Tensor, v: Tensor, carry: dict[str, Tensor]) -> None:
        self.near.leave(x, k, v, carry)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.joined().extend(k, v)


def newest(old: Tensor, new: Tensor, dim: int) -> Tensor:
    """The last C along `dim` of old (C of them) and new together, in a tensor of its own."""
    n_old, n_new = old.shape[dim], new.shape[dim]
    if n_new >= n_old:
        return new.narrow(dim, n_new - n_old, n_old).to(old.dtype, copy=True)
    return torch.cat((old.narrow(dim, n_new, n_old - n_new), new.to(old.dtype)), dim=dim)


def segments_of(x: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Segments `chosen` (B, m) of x (B, tokens, ...), one behind the other: (B, m * size, ...)."""
    numbers = chosen[:, :, None] * size + torch.arange(size, device=x.device)  # (B, m, size)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, numbers.flatten(1)]


class XLMemory(SlotMemory):
    """C tokens before each row, of which the last `valid` (B,) are there."""

    plain_keys = True

    def __init__(self, length: int, layers: list[Kept], valid: Tensor, reset_on_bos: bool):
        self.length = self.kept = length
        self.layers, self.valid, self.reset_on_bos = layers, valid, reset_on_bos
        self._next: dict[int, Kept] = {}

    def layer(self, index: int) -> Kept:  # type: ignore[override]  # a tuple has no other bases
        return self.layers[index]

    def keep(self, index: int, carry: dict[str, Tensor]) -> None:
        self._next[index] = self.layers[index].followed_by(carry)

    def first_key(self, documents: Tensor | None) -> Tensor:
        if not self.reset_on_bos:
            return self.length - self.there()[:1]  # the same in all rows
        assert documents is not None, "documents tell where memory ends"
        goes_on = documents[:, 0] == 0
        return self.length - self.there() * goes_on

    def there(self) -> Tensor:
        """(B,) tokens that the next call is shown: its last ones before each row."""
        return self.valid

    def advance(self, documents: Tensor) -> None:
        self.layers = [self._next[index] for index in range(len(self.layers))]
        self._next = {}
        added: Tensor | int = documents.shape[1]
        before = self.valid
        if self.reset_on_bos:
            newest = documents == documents[:, -1:]
            added = newest.sum(1)
            before = before * (documents[:, -1] == 0)
        self.valid = (before + added).clamp(max=self.kept)

    def tensors(self) -> dict[str, Tensor]:
        """All there is, by name, (B, ...) each."""
        parts = (
            (f"{i}.{name}", tensor) for i, kept in enumerate(self.layers) for name, tensor in kept._asdict().items()
        )
        return {"valid": self.valid, **dict(parts)}


class XL(LaneMemory):
    """Queries also see the last C tokens of the segments before theirs, through which no gradient goes.

    A token of a segment of T sees everything up to itself among C + T positions, which are given out anew in each
    segment. In training; the text that is sampled from, and each row of validation, begins with an empty memory and
    sees all of itself: a validation.seq_len of C + training.seq_len shows tokens as much as training does. With masks
    over [memory; segment] SDPA has no flash kernel; `flex` leaves out what is hidden. Source: arXiv 1901.02860.
    """

    class Config(LaneMemory.Config):
        type: Literal["xl"] = "xl"
        length: PositiveInt = Field(examples=[2048])
        """Tokens C that are remembered."""
        recompute_kv: bool = False
        """Remember the attention's inputs in place of keys and values, which are made anew in each segment: their
        matrices then learn from remembered tokens too (LSWTransformer)."""
        reset_on_bos: bool = False
        """Remember nothing of other documents than that with which a segment begins."""

        @property
        def kept(self) -> int:
            """Tokens of which there is something."""
            return self.length

        def keys(self, seq_len: int) -> int:
            return self.length + seq_len

        def span(self, seq_len: int) -> int:
            return self.length + seq_len

        def anew(self, seq_len: int) -> float:
            return (self.keys(seq_len) / seq_len - 1) * self.recompute_kv

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            span = self.span(job.training.seq_len)
            if job.validation.enable and job.validation.seq_len < span:
                yield (
                    f"validation rows begin with an empty memory: with validation.seq_len = {job.validation.seq_len} "
                    f"tokens see less than the {span} that model.memory.length + training.seq_len make in training"
                )

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if self.recompute_kv or degree(job) == 1:
                return
            for attention in {layer.attention for layer in job.model.each_layer()}:
                assert isinstance(attention, HeadAttention.Config)
                groups, _ = attention.kept(job.model.dim).k
                if groups % degree(job):
                    why = "with recompute_kv = false remembers keys in equal parts on each rank, and "
                    why += f"{DEGREE} = {degree(job)} does not divide {attention.kept_heads(job.model.dim)}"
                    allowed = f"model.memory.recompute_kv = true, or {DEGREE} = {divisors(groups)}"
                    yield Problem(CROSS_FIELD, ".type", why, self.type, allowed)

    def __init__(
        self,
        config: Config,
        layers: list[Layer],
        dim: int,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        summaries: nn.Module,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.shapes = [_shapes(config, layer.attention, dim, ranks) for layer in layers]
        self.slots: dict[int, XLMemory] = {}
        self.saved: Mapping[str, Tensor] = {}
        self.first_row = 0

    def of(self, rows: Tensor) -> XLMemory:
        first = int(rows[0])
        if first not in self.slots:
            begin = first - self.first_row
            self.slots[first] = self._slot(self.saved or self.empty(len(rows)), begin if self.saved else 0, len(rows))
            if self.saved and sum(len(slot.valid) for slot in self.slots.values()) == len(self.saved["valid"]):
                self.saved = {}  # all of it has gone to slots
        return self.slots[first]

    def empty(self, n_rows: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """The state of lanes that begin."""
        device = device or self.device
        state = {"valid": torch.zeros(n_rows, dtype=torch.int64, device=device)}
        for i, shapes in enumerate(self.shapes):
            for name, shape in shapes.items():
                state[f"{i}.{name}"] = torch.zeros(n_rows, *shape, dtype=self.dtype, device=device)
        return state

    def nbytes(self, n_rows: int) -> int:
        return n_rows * sum(tensor.nbytes for tensor in self.empty(1, torch.device("meta")).values())

    def _slot(self, state: Mapping[str, Tensor], begin: int, n_rows: int) -> XLMemory:
        parts = {name: tensor[begin : begin + n_rows] for name, tensor in state.items()}
        kind = KeptInputs if self.config.recompute_kv else KeptKeys
        layers: list[Kept] = [kind(*(parts[f"{i}.{name}"] for name in shapes)) for i, shapes in enumerate(self.shapes)]
        return self.slot(parts, layers)

    def slot(self, parts: Mapping[str, Tensor], layers: list[Kept]) -> XLMemory:
        """The memory of a micro-batch of which there are these parts."""
        return XLMemory(self.config.length, layers, parts["valid"], self.config.reset_on_bos)

    def state(self, rows: range) -> dict[str, Tensor]:
        if not self.slots:
            return dict(self.saved) or self.empty(len(rows))
        parts = [self.slots[first].tensors() for first in sorted(self.slots)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def split_dim(self, name: str) -> int | None:
        return 1 if name.endswith((".k", ".v")) else None

    def restore(self, state: Mapping[str, Tensor], rows: range) -> None:
        self.slots, self.saved, self.first_row = {}, state, rows.start


def _shapes(config: XL.Config, attention: object, dim: int, ranks: Ranks) -> dict[str, tuple[int, ...]]:
    """Of what one layer keeps for a row, on each rank."""
    if config.recompute_kv:
        return {"x": (config.kept, dim)}
    assert isinstance(attention, HeadAttention.Config)
    kept = attention.kept(dim)._asdict()
    return {name: (n_heads // ranks.size, config.kept, width) for name, (n_heads, width) in kept.items()}
