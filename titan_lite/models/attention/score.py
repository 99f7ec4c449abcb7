"""From scores q k^T to the weights of the values."""

from __future__ import annotations

from typing import ClassVar, Literal

from titan_lite.config.component import Component, SlotConfig


class Score(Component):
    """What a kernel makes of scaled scores (B, H, T, S) and what each query may see."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "score"
        default_type: ClassVar[str | None] = "softmax"

    def __init__(self, config: Config):
        self.config = config


class Softmax(Score):
    """weights = softmax(scores) over what may be seen. Source: arXiv 1706.03762."""

    class Config(Score.Config):
        type: Literal["softmax"] = "softmax"
