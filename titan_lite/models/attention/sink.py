"""What a query may attend to instead of any token."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.attention.kernel import Kernel
from titan_lite.models.context import Context
from titan_lite.models.module import Module


class Sink(Module):
    """Runs the kernel: (kernel, q, k, v, context) -> (B, H, T, Dv)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "sink"
        default_type: ClassVar[str | None] = "none"


class NoSink(Sink):
    """The kernel's own result."""

    class Config(Sink.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_heads: int):
        super().__init__()

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return kernel(q, k, v, context)
