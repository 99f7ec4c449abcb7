"""Ulysses: for attention, ranks with some tokens and all heads become ranks with some heads and all tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titan_lite.models.attention.kernel import Kernel, Scoring
from titan_lite.models.context import Context
from titan_lite.models.ranks import Ranks
from titan_lite.models.row import WHOLE
from titan_lite.parallel.row import SplitRow


class Ulysses(Kernel):
    """The attention's own kernel, on all tokens of a part of the heads.

    One all-to-all brings queries, keys and values there, another one the results back; where there are fewer key/value
    heads than ranks, neighbours get the same one. Source: arXiv 2309.14509 (DeepSpeed-Ulysses).
    """

    def __init__(self, alone: Kernel, scoring: Scoring, row: SplitRow):
        """`scoring` is that of the kernel `alone`."""
        super().__init__()
        self.alone, self.row, self.registers = alone, row, scoring.registers
        self.on_heads, of_heads = copy.deepcopy((alone, scoring))
        heads = Ranks()
        heads.rank, heads.size = row.rank, row.size
        of_heads.bias.split(heads)
        for module in self.on_heads.modules():
            getattr(module, "split", _nothing)(heads)
        self.key = f"ulysses {alone.key}"

    def acting(self, device: torch.device, n_queries: int, n_keys: int) -> str:
        return self.alone.acting(device, n_queries, n_keys)

    def prepare(self, context: Context) -> Any:
        if context.row.size == 1:
            return self.alone.prepare(context)
        return self.on_heads.prepare(self._of_whole_rows(context))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if context.row.size == 1:
            y: Tensor = self.alone(q, k, v, self._told(self.alone, context))
            return y
        y = self.on_heads(*self._to_heads(q, k, v), self._told(self.on_heads, self._of_whole_rows(context)))
        return self._to_tokens(y)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if context.row.size == 1:
            return self.alone.with_lse(q, k, v, self._told(self.alone, context))
        context = self._told(self.on_heads, self._of_whole_rows(context))
        y, lse = self.on_heads.with_lse(*self._to_heads(q, k, v), context)
        both = self._to_tokens(torch.cat((y, lse[..., None].to(y.dtype)), dim=-1))
        return both[..., :-1], both[..., -1].float()

    def _told(self, kernel: Kernel, context: Context) -> Context:
        return context._replace(prepared={kernel.key: context.prepared[self.key]})

    def _of_whole_rows(self, context: Context) -> Context:
        positions = torch.arange(context.row.size * context.positions.shape[0], device=context.positions.device)
        noise = None if context.noise is None else context.noise._replace(tokens=None)
        return context._replace(positions=positions, stream_positions=None, row=WHOLE, noise=noise)

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all heads and own tokens those of own heads and all tokens; of registers, which every rank has, too."""
        k, v = (x.repeat_interleave(max(1, self.row.size // x.shape[1]), dim=1) for x in (k, v))
        n = self.registers
        q, of_keys, of_values = self._exchange((q, k[:, :, n:], v[:, :, n:]))
        if n:
            of_keys, of_values = (
                torch.cat((x[:, :, :n].chunk(self.row.size, dim=1)[self.row.rank], tokens), dim=2)
                for x, tokens in ((k, of_keys), (v, of_values))
            )
        return q, of_keys, of_values

    def _exchange(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """x (B, n, T, D) of all heads and own tokens -> of own heads and all tokens, in one collective."""
        parts = [torch.stack(x.chunk(self.row.size, dim=1)) for x in xs]  # (ranks, B, n / ranks, T, D)
        flat = self.row.exchanged(torch.cat([part.flatten(1) for part in parts], dim=1))
        sizes = [part[0].numel() for part in parts]
        of_ranks = [x.view(part.shape) for x, part in zip(flat.split(sizes, dim=1), parts, strict=True)]
        return [self.row.in_order(x.unbind(), dim=2) for x in of_ranks]

    def _to_tokens(self, y: Tensor) -> Tensor:
        """(B, n, all tokens, D) of own heads -> (B, all heads, own tokens, D)."""
        return torch.cat(self.row.exchanged(torch.stack(self.row.dealt(y, dim=2))).unbind(), dim=1)


def _nothing(ranks: Ranks) -> None:
    pass
