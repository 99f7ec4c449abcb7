"""Ring attention: a rank's queries meet the keys and values of all ranks, part by part.

Source: arXiv 2310.01889; keys and values gathered at once: arXiv 2407.21783, section 3.3.2 (Llama 3); head and tail:
zhuzilin/ring-flash-attention, torch's context parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_lite.models.attention.kernel import SDPA, Eager, Kernel, Scoring
from titan_lite.models.attention.kernel.base import type_of
from titan_lite.models.context import Context
from titan_lite.models.dropout import Dropout, Noise
from titan_lite.parallel.deal import RotateMethod
from titan_lite.parallel.partial import (
    FLASH_DTYPES,
    WIDEST_FLASH_HEAD,
    Flash,
    Part,
    Partial,
    Surroundings,
    Whole,
    WrittenOut,
    merge,
)
from titan_lite.parallel.row import SplitRow, ops

Gradients: TypeAlias = Callable[[Part], Tensor]
"""From a part to the gradient of its kv, in float32; called once for each."""


class Rotation(Protocol):
    """How keys and values come round. The first part is always that of the rank itself."""

    def parts(self, kv: Tensor) -> Iterator[Part]:
        """Of each rank's own kv (B, G, T, n) what this rank's queries may see of all of them."""
        ...

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        """The gradient of this rank's own kv, in float32, from the parts that all ranks have seen."""
        ...


class AllGather:
    """All at once, in one collective; in backward again, so that no layer keeps them, and gradients are summed."""

    def __init__(self, row: SplitRow):
        self.row = row

    def parts(self, kv: Tensor) -> Iterator[Part]:
        arriving = self.row.gathering(kv)
        yield own(self.row, kv)
        yield from self._others(self._whole(arriving))

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        arriving = self.row.gathering(kv)
        of_own = gradients(own(self.row, kv))
        whole = self._whole(arriving)
        of_whole = torch.zeros_like(whole, dtype=torch.float32)
        for part, (_, start, stop) in zip(self._others(whole), self._stretches(kv.shape[2]), strict=True):
            of_whole[:, :, start:stop] = gradients(part)
        return of_own + ops.wait_tensor(self.row.summing(self.row.dealt(of_whole, dim=2)))

    def _whole(self, arriving: Tensor) -> Tensor:
        """(B, G, n T, ...), in the row's order."""
        return self.row.in_order(ops.wait_tensor(arriving).chunk(self.row.size), dim=2)

    def _others(self, whole: Tensor) -> Iterator[Part]:
        for first, start, stop in self._stretches(whole.shape[2] // self.row.size):
            yield Part(whole[:, :, start:stop], torch.arange(start, stop, device=whole.device), first)

    def _stretches(self, n_own: int) -> Iterator[tuple[int, int, int]]:
        """Tokens of others between this rank's chunks: the first of its queries that sees them, start and stop.

        A rank with the first chunk alone has one stretch behind it, which none of its queries see.
        """
        own_chunks = self.row.chunks[self.row.rank]
        size = n_own // len(own_chunks)
        if own_chunks == (0,):
            yield n_own, n_own, self.row.size * n_own
        start = 0
        for number, chunk in enumerate(own_chunks):
            if start < chunk * size:
                yield number * size, start, chunk * size
            start = (chunk + 1) * size


class AllToAll:
    """From rank to rank round a ring, so that beside its own a rank holds those of one other, and the next arriving
    while it works on them; in backward they go round again, and their gradients one step behind them."""

    def __init__(self, row: SplitRow):
        self.row = row

    def parts(self, kv: Tensor) -> Iterator[Part]:
        arriving = self.row.passing(kv)
        yield own(self.row, kv)
        for step in range(1, self.row.size):
            there = ops.wait_tensor(arriving).view(kv.shape)
            if step < self.row.size - 1:
                arriving = self.row.passing(there)
            yield self._seen(there, (self.row.rank - step) % self.row.size)

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        arriving = self.row.passing(kv)
        of_own = gradients(own(self.row, kv))
        moving: Tensor | None = None
        for step in range(1, self.row.size):
            there = ops.wait_tensor(arriving).view(kv.shape)
            if step < self.row.size - 1:
                arriving = self.row.passing(there)
            found = self._of_seen(there, (self.row.rank - step) % self.row.size, gradients)
            if moving is not None:
                found = found + ops.wait_tensor(moving).view(kv.shape)
            moving = self.row.passing(found)
        assert moving is not None, "a row of one rank is not split"
        return of_own + ops.wait_tensor(moving).view(kv.shape)

    def _seen(self, kv: Tensor, source: int) -> Part:
        """Of another rank's tokens those that this rank's queries see; all, for no query, where they see none."""
        mine, theirs = self.row.chunks[self.row.rank], self.row.chunks[source]
        size = kv.shape[2] // len(theirs)
        before = [chunk for chunk in theirs if chunk < mine[-1]]
        if not before:
            return Part(kv, positions(self.row, source, kv), kv.shape[2])
        first = sum(chunk < before[0] for chunk in mine)
        assert mine[first] > before[-1], "queries see all of these chunks or none"
        n_keys = len(before) * size
        return Part(kv[:, :, :n_keys], positions(self.row, source, kv)[:n_keys], first * size)

    def _of_seen(self, kv: Tensor, source: int, gradients: Gradients) -> Tensor:
        """The gradient of another rank's kv from this rank's queries."""
        found = torch.zeros_like(kv, dtype=torch.float32)
        part = self._seen(kv, source)
        found[:, :, : part.kv.shape[2]] = gradients(part)
        return found


ROTATIONS: dict[RotateMethod, Callable[[SplitRow], Rotation]] = {"allgather": AllGather, "alltoall": AllToAll}


def positions(row: SplitRow, rank: int, kv: Tensor) -> Tensor:
    """(T,) of a rank's tokens."""
    return row.dealt(torch.arange(row.size * kv.shape[2], device=kv.device), dim=0)[rank]


def own(row: SplitRow, kv: Tensor) -> Part:
    """The rank's own part of its kv (B, G, T, ...)."""
    return Part(kv, positions(row, row.rank, kv), diagonal=True)


class Ring(Kernel):
    """The kernel of a rank that has some tokens of each row, round which keys and values come.

    Results of parts are merged in float32. Registers are one more part, which each rank has itself. Where a whole row
    is on the rank, as in decoding, the attention's own kernel computes it.
    """

    def __init__(self, alone: Kernel, scoring: Scoring, row: SplitRow, rotation: Rotation):
        super().__init__()
        self.alone, self.scoring, self.row, self.rotation = alone, scoring, row, rotation
        self.fused = any(isinstance(module, SDPA) for module in alone.modules())
        dropouts = (module for module in alone.modules() if isinstance(module, Dropout))
        self.dropout = next(dropouts, None)
        self.key = f"ring {alone.key}"

    def acting(self, device: torch.device, n_queries: int, n_keys: int) -> str:
        flash = self.fused and self.scoring.only_causal(n_keys, documents=True)
        return type_of(SDPA.Config if flash else Eager.Config)

    def prepare(self, context: Context) -> Any:
        return self.alone.prepare(context) if context.row.size == 1 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if context.row.size == 1:
            y: Tensor = self.alone(q, k, v, self._of_alone(context))
            return y
        flash = self.fused and self._is_for_flash(q, v, context)
        partial = Flash(self.scoring.scale, k.shape[-1]) if flash else self._written_out(k)
        return self._attend(partial, q, k, v, context)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if context.row.size == 1:
            return self.alone.with_lse(q, k, v, self._of_alone(context))
        return self._attend(self._written_out(k), q, k, v, context)

    def _of_alone(self, context: Context) -> Context:
        return context._replace(prepared={self.alone.key: context.prepared[self.key]})

    def _written_out(self, k: Tensor) -> Partial:
        return WrittenOut(self.scoring, k.shape[-1], self.dropout)

    def _is_for_flash(self, q: Tensor, v: Tensor, context: Context) -> bool:
        width, plain = q.shape[-1], self.scoring.only_causal(self.row.size * q.shape[2], context.documents is not None)
        able = not q.is_cuda or (q.dtype in FLASH_DTYPES and width % 8 == 0 and width <= WIDEST_FLASH_HEAD)
        return able and plain and v.shape[-1] == width

    def _attend(self, partial: Partial, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        documents, noise = self.scoring.documents(context), context.noise
        key, rows = (None, None) if noise is None or self.dropout is None else noise[:2]
        kv = torch.cat((k, v), dim=-1)
        y, lse = _Attention.apply(self, partial, q, kv, context.positions, documents, key, rows)
        return y, lse

    def parts(self, kv: Tensor) -> Iterator[Part]:
        """The registers, if there are any, and what comes round."""
        n = self.scoring.registers
        if n:
            yield Part(kv[:, :, :n], None)
        yield from self.rotation.parts(kv[:, :, n:])

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        """The gradient of registers and own tokens, in float32."""
        n = self.scoring.registers
        of_registers = [gradients(Part(kv[:, :, :n], None))] if n else []
        return torch.cat((*of_registers, self.rotation.backward(kv[:, :, n:], gradients)), dim=2)


class _Attention(torch.autograd.Function):
    """q (B, H, T, Dh) and kv (B, G, R + T, Dh + Dv) of a rank -> y (B, H, T, Dv) and lse (B, H, T)."""

    @staticmethod
    def forward(
        ctx: Any,
        ring: Ring,
        partial: Partial,
        q: Tensor,
        kv: Tensor,
        at: Tensor,
        documents: Tensor | None,
        key: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        around = _surroundings(ring, at, documents, key, rows)
        merged: tuple[Tensor, Tensor] | None = None
        for part in ring.parts(kv):
            if merged is not None and part.first == q.shape[2]:
                merged = after(merged[0], [part.kv]), merged[1]
                continue
            new = partial.forward(q[:, :, part.first :], part, around)
            merged = (new[0].float(), new[1]) if merged is None else merge(*merged, *new)
        assert merged is not None
        y, lse = merged[0].to(q.dtype), merged[1]
        ctx.ring, ctx.partial = ring, partial
        ctx.save_for_backward(q, kv, y, lse, at, documents, key, rows)
        ctx.set_materialize_grads(False)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_lse: Tensor | None) -> tuple[Any, ...]:
        q, kv, y, lse, at, documents, key, rows = ctx.saved_tensors
        if torch.compiler.is_compiling():
            kv = after(kv, [grad])  # what no gradient is in, a compiler computes in forward, and keeps
        around = _surroundings(ctx.ring, at, documents, key, rows)
        delta = (grad.float() * y.float()).sum(-1)
        whole = Whole(grad, y, lse, delta if of_lse is None else delta - of_lse)
        of_q = torch.zeros_like(q, dtype=torch.float32)

        def gradients(part: Part) -> Tensor:
            if part.first == q.shape[2]:
                return after(torch.zeros_like(part.kv, dtype=torch.float32), [part.kv])
            found, of_kv = ctx.partial.backward(whole.behind(part.first), q[:, :, part.first :], part, around)
            of_q[:, :, part.first :] += found
            return of_kv.float()

        of_kv = ctx.ring.backward(kv, gradients)
        return None, None, of_q.to(q.dtype), of_kv.to(kv.dtype), None, None, None, None


@torch.library.custom_op("titan_lite::after", mutates_args=())
def after(x: Tensor, others: list[Tensor]) -> Tensor:
    """x, once the others are there: graphs leave out a collective that nothing reads, and other ranks wait for it."""
    return x.clone()


@after.register_fake
def _(x: Tensor, others: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


def _surroundings(
    ring: Ring, at: Tensor, documents: Tensor | None, key: Tensor | None, rows: Tensor | None
) -> Surroundings:
    noise = None if key is None else Noise(key, cast(Tensor, rows))
    return Surroundings(at, ring.row.size * at.shape[0], documents, noise)
