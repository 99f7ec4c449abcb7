"""The kernel that suits the attention and the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from titan_lite.config.machine import has_cuda
from titan_lite.models.attention.kernel.base import (
    WASTE,
    Kernel,
    Scoring,
    hides_some,
    n_keys,
    skipping_kernels,
    type_of,
)
from titan_lite.models.attention.kernel.eager import Eager
from titan_lite.models.attention.kernel.flex import BLOCK, Flex
from titan_lite.models.attention.kernel.sdpa import SDPA
from titan_lite.models.context import Context

if TYPE_CHECKING:
    from titan_lite.models.attention.heads import HeadAttention


class Prepared(NamedTuple):
    """What one of the two kernels has prepared for a forward."""

    skips: bool
    arguments: Any


class Auto(Kernel):
    """`sdpa` where it computes the attention asked for, else `eager`; on CUDA `flex`, where it is better and able to.

    It is better where the causal mask is not all there is to do: it leaves out what windows and documents hide, and
    holds neither the mask nor the scores. Not in decoding, where each token would be another shape to compile for.
    Source: arXiv 2205.14135 (`sdpa`), arXiv 2412.05496 (`flex`).
    """

    class Config(Kernel.Config):
        type: Literal["auto"] = "auto"

        def plain(self, attention: HeadAttention.Config, dim: int) -> Kernel.Config:
            """The kernel for any device."""
            sdpa = SDPA.Config()
            return Eager.Config() if any(sdpa.refusals(attention, dim)) else sdpa

        def build_for(self, attention: HeadAttention.Config, dim: int, scoring: Scoring) -> Kernel:
            plain = self.plain(attention, dim).build_for(attention, dim, scoring)
            flex = Flex.Config()
            if any(flex.refusals(attention, dim)):
                return plain
            return Auto(self, scoring, plain, flex.build_for(attention, dim, scoring))

        def remarks(self, attention: HeadAttention.Config, dim: int, seq_len: int) -> Iterable[str]:
            able = not any(Flex.Config().refusals(attention, dim))
            if (has_cuda() and able) or not hides_some(attention, seq_len):
                return
            line = f'kernel = "auto" is "{type_of(self.plain(attention, dim))}" here, which {WASTE}'
            if able:
                yield f'{line}; on a machine with CUDA devices it is "flex", which leaves them out'
            else:
                others = skipping_kernels(attention, dim)
                yield f"{line}; kernel = {others} leaves them out" if others else line

    def __init__(self, config: Config, scoring: Scoring, plain: Kernel, flex: Kernel):
        super().__init__()
        self.scoring, self.plain, self.flex = scoring, plain, flex
        self.key = f"auto {plain.key} {flex.key}"

    def acting(self, device: torch.device, n_queries: int, n_keys: int) -> str:
        return self._kernel(self._skips(device, n_queries, n_keys, documents=True)).acting(device, n_queries, n_keys)

    def prepare(self, context: Context) -> Prepared:
        sizes = (len(context.positions), n_keys(context))
        fixed = not context.memory.grows
        skips = fixed and self._skips(context.positions.device, *sizes, context.documents is not None)
        return Prepared(skips, self._kernel(skips).prepare(context))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        kernel, context = self._prepared(context)
        y: Tensor = kernel(q, k, v, context)
        return y

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        kernel, context = self._prepared(context)
        return kernel.with_lse(q, k, v, context)

    def _skips(self, device: torch.device, n_queries: int, n_keys: int, documents: bool) -> bool:
        easy = isinstance(self.plain, SDPA) and self.scoring.plain_causal(n_queries, n_keys, documents)
        # What stands in one block is computed as a whole.
        return device.type == "cuda" and n_keys > BLOCK and not easy

    def _kernel(self, skips: bool) -> Kernel:
        return self.flex if skips else self.plain

    def _prepared(self, context: Context) -> tuple[Kernel, Context]:
        """The kernel that has prepared this forward, and the context as it wants it."""
        skips, arguments = context.prepared[self.key]
        kernel = self._kernel(skips)
        return kernel, context._replace(prepared={kernel.key: arguments})
