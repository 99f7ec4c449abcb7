"""The package flash_attn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.errors import CROSS_FIELD, NOT_HERE, Problem, show
from titan_lite.config.machine import has_cuda, is_installed
from titan_lite.models.attention.kernel.base import Kernel, Scoring, type_of
from titan_lite.models.attention.kernel.eager import Eager
from titan_lite.models.attention.mask import Causal, Documents, SlidingWindow
from titan_lite.models.context import Context
from titan_lite.models.position.alibi import ALiBi, ALiBiBias

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.attention.heads import HeadAttention

WIDEST_HEAD = 256
MASKS = (Causal.Config, Documents.Config, SlidingWindow.Config)
OTHERS = '"auto", "sdpa" or "eager"'
"""Kernels that run wherever this one does not."""
DTYPES = (torch.float16, torch.bfloat16)


class FlashArguments(NamedTuple):
    """What flash_attn is told of one forward."""

    slopes: Tensor | None
    """(H,) float32, ALiBi's."""
    bounds: Tensor | None
    """int32: where documents begin among all rows' tokens, and their number; None where rows are not cut."""
    deterministic: bool


class FlashAttention(Kernel):
    """The kernels of the package flash_attn 2, which leave out what windows and documents hide.

    A row of packed documents goes in as sequences of their own. For 16-bit numbers on CUDA; elsewhere a trained model's
    results come from `eager`. Source: arXiv 2307.08691.
    """

    class Config(Kernel.Config):
        type: Literal["flash_attn"] = "flash_attn"
        scores: ClassVar[tuple[str, ...] | None] = ("softmax", "softmax_capped")
        no_dropout: ClassVar[str] = "flash_attn draws from a generator, so that the draw depends on the layout"
        no_lse: ClassVar[str] = "flash_attn returns the log-sum-exp without a gradient"
        no_parts: ClassVar[str] = "flash_attn's backward knows the softmax of the keys of one call alone"
        skips: ClassVar[bool] = True

        def refusals(self, attention: HeadAttention.Config, dim: int) -> Iterable[Problem]:
            yield from super().refusals(attention, dim)
            width, value_width = attention.width(dim), attention.value_width(dim)
            if value_width != width:
                why = f'kernel = "flash_attn" wants values as wide as queries and keys, here {width}'
                allowed = f'{width}, or kernel = "sdpa", "flex" or "eager"'
                yield Problem(CROSS_FIELD, ".value_dim", why, value_width, allowed)
            if width > WIDEST_HEAD:
                why = f'kernel = "flash_attn" takes heads up to a width of {WIDEST_HEAD}'
                allowed = f'at most {WIDEST_HEAD}, or kernel = "sdpa", "flex" or "eager"'
                yield Problem(CROSS_FIELD, ".head_dim", why, width, allowed)
            yield from _register_refusals(attention)
            for index, mask in enumerate(attention.masks):
                if not isinstance(mask, MASKS):
                    why = 'kernel = "flash_attn" has causal, document and sliding_window masks only'
                    allowed = 'kernel = "sdpa", "flex" or "eager"'
                    yield Problem(CROSS_FIELD, f".masks[{index}].type", why, allowed=allowed)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if job.training.dtype == job.training.mixed_precision_param == "float32":
                why = 'flash_attn computes in 16 bits, and training.mixed_precision_param is "float32"'
                allowed = f'{OTHERS}, or training.mixed_precision_param = "bfloat16"'
                yield Problem(CROSS_FIELD, ".type", why, self.type, allowed)
            if not has_cuda():
                why = "flash_attn runs on CUDA only, and there is no CUDA device on this machine"
                yield Problem(NOT_HERE, ".type", why, self.type, OTHERS)
            elif not is_installed("flash_attn"):
                why = "flash_attn is not installed: pip install 'titan_lite[flash]'"
                yield Problem(NOT_HERE, ".type", why, self.type, OTHERS)

    def __init__(self, config: Config, scoring: Scoring):
        super().__init__()
        assert not scoring.bias.key or isinstance(scoring.bias, ALiBiBias), "flash_attn knows no other bias"
        self.scoring = scoring
        self.key = f"flash_attn {scoring.key}"
        self.elsewhere: Eager = Eager.Config().build(scoring=scoring)
        self.installed = is_installed("flash_attn")
        windows = [mask.window for mask in scoring.masks if isinstance(mask, SlidingWindow)]
        causal = any(isinstance(mask, Causal) for mask in scoring.masks)
        self.options: dict[str, Any] = {
            "softmax_scale": scoring.scale,
            "causal": causal,
            # It counts the keys beside the query's own; -1 = no bound.
            "window_size": (min(windows) - 1 if windows else -1, 0 if causal else -1),
            "softcap": scoring.score.cap,
        }

    def prepare(self, context: Context) -> FlashArguments:
        device, documents = context.positions.device, self.scoring.documents(context)
        bias = self.scoring.bias
        return FlashArguments(
            slopes=torch.tensor(bias.slopes, device=device) if isinstance(bias, ALiBiBias) else None,
            bounds=None if documents is None else document_bounds(documents),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if not self.runs_on(q) or context.first_key is not None:
            grids = self.scoring.grids(context, k.shape[2] - self.scoring.registers)
            return self.elsewhere(q, k, v, context._replace(prepared={self.elsewhere.key: grids}))
        import flash_attn

        slopes, bounds, deterministic = context.prepared[self.key]
        options = self.options | {"alibi_slopes": slopes, "deterministic": deterministic}
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, Dh)
        if bounds is None:
            return flash_attn.flash_attn_func(q, k, v, **options).transpose(1, 2)  # (B, H, T, Dv)
        y = flash_attn.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=q.shape[1],
            max_seqlen_k=k.shape[1],
            **options,
        )
        return y.view(*q.shape[:3], -1).transpose(1, 2)  # (B, H, T, Dv)

    def runs_on(self, q: Tensor) -> bool:
        """Whether flash_attn takes such queries on this machine."""
        return self.installed and q.is_cuda and q.dtype in DTYPES


def _register_refusals(attention: HeadAttention.Config) -> Iterable[Problem]:
    """Queries see registers behind a causal mask alone, which is aligned with the last key."""
    found = type_of(attention.registers)
    if found == "none":
        return
    allowed = '"none", or kernel = "sdpa", "flex" or "eager"'
    hiding = [type_of(mask) for mask in attention.masks if not isinstance(mask, Causal.Config)]
    if hiding:
        why = f'kernel = "flash_attn" would also hide registers with masks = {show(hiding)}'
        yield Problem(CROSS_FIELD, ".registers.type", why, found, allowed)
    if isinstance(attention.position, ALiBi.Config):
        why = 'kernel = "flash_attn" would count registers as tokens for position = "alibi"'
        yield Problem(CROSS_FIELD, ".registers.type", why, found, allowed)


def document_bounds(documents: Tensor) -> Tensor:
    """(n + 1,) int32: where each of n documents begins among the tokens of all rows (B, T), and B * T.

    A document has one number all along and another than its neighbours in the row. Waits for the device.
    """
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).int()
