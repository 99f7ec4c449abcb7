"""The position slot."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.context import Context
from titan_lite.models.module import Module


class Position(Module):
    """Acts on queries (B, H, T, Dh) and keys (B, G, T, Dh).

    `prepare` runs once per forward for all layers with one `key`; its result comes back in `context.prepared[key]`.
    """

    key: str

    class Config(SlotConfig):
        slot: ClassVar[str] = "position"
        default_type: ClassVar[str | None] = "rope"

    def prepare(self, context: Context) -> Any:
        """What every layer with this encoding shares in one forward."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
