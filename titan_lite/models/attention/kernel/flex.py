"""torch's FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, create_block_mask, flex_attention

from titan_lite.config.errors import NOT_HERE, Problem
from titan_lite.config.machine import has_cuda
from titan_lite.models.attention.kernel.base import Kernel, Scoring, n_keys, of_keys
from titan_lite.models.context import Context, key_positions

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.attention.heads import HeadAttention

BLOCK = 128
"""Queries, and keys, of the blocks that are computed or left out as a whole: torch's default."""
SMALLEST_HEAD = 16
"""Narrowest head of the kernel that torch writes for CUDA."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One for all layers; not made on import, which would take as long as torch.compile takes to import."""
    return torch.compile(function)


class FlexArguments(NamedTuple):
    """What `flex_attention` is told beside queries, keys and values."""

    block_mask: BlockMask
    score_mod: ScoreMod | None


class Flex(Kernel):
    """torch's `flex_attention`, which leaves out each 128 x 128 block of scores that the masks hide as a whole.

    On CUDA a kernel is compiled for the masks and scores asked for. On a CPU all scores are computed, and only forward:
    FlexAttention has no backward there. Source: arXiv 2412.05496.
    """

    class Config(Kernel.Config):
        type: Literal["flex"] = "flex"
        scores: ClassVar[tuple[str, ...] | None] = ("softmax", "softmax_capped")
        no_dropout: ClassVar[str] = "flex_attention changes scores, and dropout acts behind their softmax"
        no_parts: ClassVar[str] = "FlexAttention's backward knows the softmax of the keys of one call alone"
        skips: ClassVar[bool] = True

        def refusals(self, attention: HeadAttention.Config, dim: int) -> Iterable[Problem]:
            yield from super().refusals(attention, dim)
            for key, found in ((".head_dim", attention.width(dim)), (".value_dim", attention.value_width(dim))):
                if has_cuda() and found < SMALLEST_HEAD:
                    why = f'heads are {found} wide, and kernel = "flex" has none below {SMALLEST_HEAD} on CUDA'
                    yield Problem(NOT_HERE, key, why, found, f'at least {SMALLEST_HEAD}, or kernel = "sdpa" or "eager"')

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if not has_cuda():
                why = "FlexAttention has no backward on a CPU, and there is no CUDA device on this machine"
                yield Problem(NOT_HERE, ".type", why, self.type, '"auto", "sdpa" or "eager"')

    def __init__(self, config: Config, scoring: Scoring):
        super().__init__()
        self.scoring = scoring
        self.key = f"flex {scoring.key} {scoring.score.config.model_dump_json()}"

    def prepare(self, context: Context) -> FlexArguments:
        start, (n_queries,), device = context.memory.length, context.positions.shape, context.positions.device
        documents, first_key = self.scoring.documents(context), context.first_key
        per_row = documents if documents is not None else first_key
        rows = None if per_row is None or len(per_row) == 1 else len(per_row)
        create: Callable[..., BlockMask] = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        n_all = self.scoring.registers + n_keys(context)
        mask_mod = self.mask_mod(documents, start, first_key, context.recalled)
        mask = create(mask_mod, rows, None, n_queries, n_all, device=device)
        return FlexArguments(mask, self.score_mod(start, context.recalled))

    def mask_mod(self, documents: Tensor | None, start: int, first_key: Tensor | None, recalled: int) -> MaskMod:
        """All masks for index tensors (row, head, query, key), where the first query has key number `start`."""
        of_all = None if documents is None else of_keys(documents, start + documents.shape[1])
        scoring, registers = self.scoring, self.scoring.registers

        def allowed(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            pair = (None, None) if of_all is None else (of_all[row, q + start], of_all[row, k])
            return scoring.allowed(key_positions(q + start, recalled), key_positions(k, recalled), *pair)

        def remembered(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            assert first_key is not None
            # One for all rows, or one for each.
            return allowed(row, head, q, k) & ((k >= first_key[row % len(first_key)]) | (k == q + start))

        of_tokens = allowed if first_key is None else remembered

        def beside_registers(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k < registers) | of_tokens(row, head, q, (k - registers).clamp(min=0))

        return beside_registers if registers else of_tokens

    def score_mod(self, start: int, recalled: int) -> ScoreMod | None:
        """Cap and bias for a score and index tensors (row, head, query, key); None where scores stay as they are."""
        score, bias, registers = self.scoring.score, self.scoring.bias, self.scoring.registers

        def capped(value: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score.capped(value)

        def biased(value: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score.capped(value) + bias.element(
                head, key_positions(q + start, recalled), key_positions(k, recalled)
            )

        def biased_beside_registers(value: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(k < registers, score.capped(value), biased(value, row, head, q, k - registers))

        if bias.key:
            return biased_beside_registers if registers else biased
        return capped if score.cap else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return self._attend(q, k, v, context, AuxRequest())[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        y, aux = self._attend(q, k, v, context, AuxRequest(lse=True))
        assert aux.lse is not None
        return y, aux.lse

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, wanted: AuxRequest
    ) -> tuple[Tensor, AuxOutput]:
        arguments: FlexArguments = context.prepared[self.key]
        # A block that is compiled takes the function itself into its graph.
        by_itself = q.is_cuda and not torch.compiler.is_compiling()
        attend: Any = _compiled(flex_attention) if by_itself else flex_attention
        return attend(
            q,
            k,
            v,
            score_mod=arguments.score_mod,
            block_mask=arguments.block_mask,
            scale=self.scoring.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=wanted,
        )
