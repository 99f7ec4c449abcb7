"""The kernel slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.machine import has_cuda
from titan_lite.models.attention.mask import Causal, Mask
from titan_lite.models.attention.score import Score
from titan_lite.models.context import Context, key_positions
from titan_lite.models.module import Module
from titan_lite.models.position import ScoreBias

if TYPE_CHECKING:
    from titan_lite.models.attention.heads import HeadAttention


@dataclass(frozen=True)
class Scoring:
    """What a kernel computes: weights(capped(q k^T * scale) + bias) over the keys that all masks allow, some dropped.

    `capped` and `weights` are the score's. Of S keys the first `registers` are no tokens: every query sees them, and no
    bias is added to their scores.
    """

    scale: float
    masks: tuple[Mask, ...]
    bias: ScoreBias
    score: Score
    dropout: float
    registers: int = 0

    @property
    def key(self) -> str:
        """Equal for layers that can share what is prepared."""
        masks = (mask.config.model_dump_json() for mask in self.masks)
        return " ".join((*masks, self.bias.key, *[f"registers {self.registers}"] * bool(self.registers)))

    def documents(self, context: Context) -> Tensor | None:
        """(B, T) document numbers where a mask asks for them."""
        return context.documents if any(mask.reads_documents for mask in self.masks) else None

    def plain_causal(self, n_queries: int, n_keys: int, documents: bool) -> bool:
        """Whether scores only have to be hidden by the causal mask of a square, with or without document numbers."""
        return n_queries == n_keys and not self.registers and self.only_causal(n_keys, documents)

    def only_causal(self, n_keys: int, documents: bool) -> bool:
        """Whether nothing happens to scores of so many tokens but that the causal mask hides some."""
        hiding = (mask for mask in self.masks if mask.hides(n_keys, documents))
        return not self.bias.key and all(isinstance(mask, Causal) for mask in hiding)

    def newest_sees_all(self, context: Context, n_keys: int) -> bool:
        """Whether there is one query, behind all keys, from which no mask hides any of them: a decoded token's."""
        if len(context.positions) > 1 or context.first_key is not None or self.bias.key:
            return False
        hiding = (mask for mask in self.masks if mask.hides(n_keys, context.documents is not None))
        return all(isinstance(mask, Causal) for mask in hiding)

    def allowed(self, q: Tensor, k: Tensor, q_document: Tensor | None, k_document: Tensor | None) -> Tensor:
        """What all masks allow; arguments as for `Mask.allowed`."""
        result: Tensor | None = None
        for mask in self.masks:
            grid = mask.allowed(q, k, q_document, k_document)
            if grid is not None:
                result = grid if result is None else result & grid
        assert result is not None, "no mask says anything"
        return result

    def grids(self, context: Context, n_keys: int) -> Grids:
        """Masks and bias over all queries and keys of this forward, registers before its `n_keys` keys of tokens."""
        q = context.positions[:, None]
        k = torch.arange(n_keys, device=q.device)[None, :]
        documents = self.documents(context)
        q_document = None if documents is None else documents[:, None, :, None]
        k_document = None if documents is None else of_keys(documents, n_keys)[:, None, None, :]
        at = key_positions(k, context.recalled)
        allowed, bias = self.allowed(q, at, q_document, k_document), self.bias.grid(q, at)
        if context.first_key is not None:
            # Tokens that are hidden themselves see themselves: weights over nothing would be no numbers.
            allowed = allowed & ((k >= context.first_key[:, None, None, None]) | (at == q))
        if self.registers:
            before = (self.registers, 0)
            allowed = F.pad(allowed, before, value=True)
            bias = None if bias is None else F.pad(bias, before)
        return Grids(allowed, bias)


def of_keys(documents: Tensor, n_keys: int) -> Tensor:
    """(B, S) document numbers of all keys, given those of the queries (B, T): memory is of the row's document 0."""
    return F.pad(documents, (n_keys - documents.shape[1], 0))


def n_keys(context: Context) -> int:
    """Keys of the tokens of this forward: those in memory and one for each query. Outside of blocks."""
    return context.memory.length + context.positions.shape[0]


class Grids(NamedTuple):
    """Everything between queries and keys that does not depend on what they are."""

    allowed: Tensor
    """bool, (T, S) or (B, 1, T, S): what all masks allow."""
    bias: Tensor | None
    """float32, broadcastable to (H, T, S), or None where nothing is added to scores."""


class PreparedKernel(Protocol):
    """A kernel that shares its mask between layers; see `Kernel`."""

    key: str

    def prepare(self, context: Context) -> Any: ...


class Kernel(Module):
    """q (B, H, T, Dh), k (B, G, S, Dh), v (B, G, S, Dv) -> (B, H, T, Dv); G divides H.

    The last T of S keys are the queries' own, the first ones are registers where there are any. `prepare` turns masks
    and bias into what the kernel wants, once per forward for all layers whose `key` is the same; the result is
    `context.prepared[key]`.
    """

    key: str

    class Config(SlotConfig):
        slot: ClassVar[str] = "kernel"
        default_type: ClassVar[str | None] = "auto"
        scores: ClassVar[tuple[str, ...] | None] = None
        """Types of the score slot that it computes; None = all."""
        no_dropout: ClassVar[str] = ""
        """Why it drops no weights; empty = it does."""
        no_lse: ClassVar[str] = ""
        """Why it has no `with_lse`; empty = it has."""
        no_parts: ClassVar[str] = ""
        """Why results of parts of the keys cannot be merged, forward and backward; empty = they can."""
        skips: ClassVar[bool] = False
        """Whether it leaves out blocks of keys that no query of a block may see."""

        def build_for(self, attention: HeadAttention.Config, dim: int, scoring: Scoring) -> Kernel:
            """The kernel of such an attention in a model of width `dim`."""
            kernel: Kernel = self.build(scoring=scoring)
            return kernel

        def refusals(self, attention: HeadAttention.Config, dim: int) -> Iterable[Problem]:
            """What this kernel does not compute of the attention around it, in a model of width `dim`.

            Keys are relative to the attention.
            """
            name, score, sink = type_of(self), type_of(attention.score), attention.sink
            if self.scores is not None and score not in self.scores:
                why = f'kernel = "{name}" does not compute this score'
                able = _kernels(lambda kernel: kernel.scores is None or score in kernel.scores)
                yield Problem(CROSS_FIELD, ".score.type", why, score, f"{_either(self.scores)}, or kernel = {able}")
            if attention.dropout and self.no_dropout:
                able = _kernels(lambda kernel: not kernel.no_dropout)
                why = f'kernel = "{name}" cannot drop weights: {self.no_dropout}'
                yield Problem(CROSS_FIELD, ".dropout", why, attention.dropout, f"0.0, or kernel = {able}")
            if sink.needs_lse and not attention.score.softmax:
                why = f'a sink takes part in a softmax, and score = "{score}" has none'
                yield Problem(CROSS_FIELD, ".sink.type", why, type_of(sink), '"none", or a score with a softmax')
            elif sink.needs_lse and self.no_lse:
                able = _kernels(lambda kernel: not kernel.no_lse)
                why = f'kernel = "{name}" cannot give a sink what it needs: {self.no_lse}'
                yield Problem(CROSS_FIELD, ".sink.type", why, type_of(sink), f'"none", or kernel = {able}')

        def remarks(self, attention: HeadAttention.Config, dim: int, seq_len: int) -> Iterable[str]:
            """What there is to say about the cost of this attention with this kernel; the same words for all layers."""
            if not self.skips and hides_some(attention, seq_len):
                line = f'kernel = "{type_of(self)}" {WASTE}'
                able = skipping_kernels(attention, dim)
                where = "" if has_cuda() else ", on a machine with CUDA devices"
                yield f"{line}; kernel = {able} leaves them out{where}" if able else line

    def acting(self, device: torch.device, n_queries: int, n_keys: int) -> str:
        """The type of the kernel that computes this in a packed row of training."""
        return type_of(self.Config)

    def prepare(self, context: Context) -> Any:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        raise NotImplementedError

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The result and log(sum(exp(scores))) of each query, (B, H, T) in float32. For scores with a softmax."""
        raise NotImplementedError


WASTE: Final = "also computes the scores that a window or a document mask hides"


def hides_some(attention: HeadAttention.Config, seq_len: int) -> bool:
    """Whether any mask beside the causal one hides keys of a packed row."""
    masks = [mask.build() for mask in attention.masks]
    return any(mask.hides(seq_len, True) and not isinstance(mask, Causal) for mask in masks)


def skipping_kernels(attention: HeadAttention.Config, dim: int) -> str:
    """The names of the kernels that compute this attention and leave out what is hidden; empty where none does."""
    return _kernels(lambda kernel: kernel.skips and not any(kernel().refusals(attention, dim)))


def type_of(config: SlotConfig | type[SlotConfig]) -> str:
    return (config if isinstance(config, type) else type(config)).model_fields["type"].default


def _either(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def _kernels(fit: Callable[[type[Kernel.Config]], bool]) -> str:
    """The names of the kernels that fit, as one reads them; empty where none does."""
    choices = cast("dict[str, type[Kernel.Config]]", Kernel.Config.choices)
    return _either(name for name, config in sorted(choices.items()) if fit(config))
