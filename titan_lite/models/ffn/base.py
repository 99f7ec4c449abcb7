"""The feed-forward slot."""

from __future__ import annotations

from typing import ClassVar

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module


class FFN(Module):
    """(B, T, D), context -> (B, T, D), each token on its own."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "ffn"
        default_type: ClassVar[str | None] = "glu"
