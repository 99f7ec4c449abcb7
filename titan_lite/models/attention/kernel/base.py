"""The kernel slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import Problem
from titan_lite.models.attention.mask import Mask
from titan_lite.models.attention.score import Score
from titan_lite.models.context import Context
from titan_lite.models.module import Module
from titan_lite.models.position import ScoreBias

if TYPE_CHECKING:
    from titan_lite.models.attention.gqa import GroupedAttention


@dataclass(frozen=True)
class Scoring:
    """What a kernel computes: score(q k^T * scale + bias) over the keys that all masks allow, with dropped weights."""

    scale: float
    masks: tuple[Mask, ...]
    bias: ScoreBias
    score: Score
    dropout: float

    @property
    def key(self) -> str:
        """Equal for layers that can share what is prepared."""
        return " ".join((*(mask.config.model_dump_json() for mask in self.masks), self.bias.key))


class PreparedKernel(Protocol):
    """A kernel that shares its mask between layers; see `Kernel`."""

    key: str

    def prepare(self, context: Context) -> Any: ...


class Kernel(Module):
    """q (B, H, T, Dh), k (B, G, S, Dh), v (B, G, S, Dv) -> (B, H, T, Dv); G divides H.

    The last T of S keys are the queries' own. `prepare` turns masks and bias into what the kernel wants, once per
    forward for all layers whose `key` is the same; the result is `context.prepared[key]`.
    """

    key: str

    class Config(SlotConfig):
        slot: ClassVar[str] = "kernel"
        default_type: ClassVar[str | None] = "sdpa"

        def refusals(self, attention: GroupedAttention.Config) -> Iterable[Problem]:
            """What of the attention around it this kernel does not compute; keys are relative to the attention."""
            return ()

    def prepare(self, context: Context) -> Any:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        raise NotImplementedError

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The result and log(sum(exp(score))) of each query, (B, H, T) in float32. For kernels with softmax."""
        raise NotImplementedError
