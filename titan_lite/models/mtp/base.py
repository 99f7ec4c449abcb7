"""The slot of what predicts tokens behind the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.models.block import Block, Layer
from titan_lite.models.context import Context
from titan_lite.models.module import Module, Total
from titan_lite.models.mtp.drafts import NO_DRAFTS, Cache, Drafts
from titan_lite.models.norm import Norm
from titan_lite.models.stack import Streams

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.transformer import Transformer


class MTP(Module):
    """(embedded tokens (B, T, D), what the stack made, the model's final norm, context) -> D states (B, T, D).

    From the k-th of them, k = 1..depth, the model's own head predicts at position i the token at i + k + 1. Training
    asks for them, and decoding that wants `drafts`; nobody else. Built as `build(dim=, layer=, norm=)`: the choices of
    the last layer, and of the norm behind it.
    """

    predictors: nn.ModuleDict
    """What each of them needs for itself, by k."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "mtp"
        default_type: ClassVar[str | None] = "none"
        embeds: ClassVar[bool] = False
        """Whether training needs embedded tokens behind the last layer."""

        def weights(self) -> tuple[float, ...]:
            """Of the mean loss of each further token, beside that of the next one."""
            raise NotImplementedError

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            if len(self.weights()) >= job.training.seq_len:
                why = f"looks beyond rows of training.seq_len = {job.training.seq_len} tokens from all positions"
                allowed = f"less than {job.training.seq_len}"
                yield Problem(CROSS_FIELD, ".depth", why, len(self.weights()), allowed)

    def __init__(self, config: Config, predictors: Sequence[nn.Module]):
        super().__init__()
        self.predictors = nn.ModuleDict({str(k): predictor for k, predictor in enumerate(predictors, 1)})
        self.depth = len(predictors)
        self._told: Tensor | None = None
        self._last: Tensor | None = None

    def forward(
        self, embedded: Tensor, streams: Streams, norm: Callable[[Tensor], Tensor], context: Context
    ) -> Sequence[Tensor]:
        raise NotImplementedError

    def blocks(self) -> dict[str, Block]:
        """The blocks by their paths, in the order in which they run."""
        paths = ((path, module) for path, module in self.named_modules() if isinstance(module, Block))
        return dict(paths)

    def units(self) -> Iterator[nn.Module]:
        """The parts whose parameters are gathered together, in the order of their use."""
        yield from self.predictors.values()

    def drafts(
        self, model: Transformer, vocab_size: int, prompt: Sequence[int], new_cache: Callable[[], Cache]
    ) -> Drafts:
        """What guesses tokens below `vocab_size` behind `prompt`, for `generate`; `new_cache` makes empty memories."""
        return NO_DRAFTS

    def tell(self, losses: Sequence[Tensor], n_targets: Sequence[Tensor]) -> None:
        """Adds up what a micro-batch's summed losses were, and over how many targets, both for each k."""
        told = torch.stack((torch.stack(list(losses)), torch.stack(list(n_targets)).float())).detach()  # (2, depth)
        self._told = told if self._told is None else self._told + told

    def after_step(self, total: Total) -> None:
        self._last, self._told = self._told, None

    def metrics(self, total: Total) -> dict[str, Tensor]:
        """`loss_k`: mean loss of the token k places behind the next one."""
        assert self._last is not None, "metrics are of a step that has ended"
        losses, n_targets = total(self._last)
        return {f"loss_{k}": loss for k, loss in enumerate((losses / n_targets.clamp(min=1)).unbind(), 1)}


def layer_context(context: Context, k: int, carry: dict[str, Tensor]) -> Context:
    """What the block of the k-th prediction is told; its number is none that a stack has, however often it iterates."""
    return context.layer(-1 - k, carry)


class NoMTP(MTP):
    """Only the next token."""

    class Config(MTP.Config):
        type: Literal["none"] = "none"

        def weights(self) -> tuple[float, ...]:
            return ()

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            return ()

    def __init__(self, config: Config, dim: int, layer: Layer, norm: Norm.Config):
        super().__init__(config, ())

    def forward(self, *args: Any) -> Sequence[Tensor]:
        return ()

    def metrics(self, total: Total) -> dict[str, Tensor]:
        return {}
