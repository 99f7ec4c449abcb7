"""What a query may attend to instead of any token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from titan_lite.config.component import SlotConfig
from titan_lite.models.attention.kernel import Kernel
from titan_lite.models.context import Context
from titan_lite.models.module import Module
from titan_lite.models.spec import Spec
from titan_lite.parallel.plan import Plan, heads


class Sink(Module):
    """Runs the kernel: (kernel, q, k, v, context) -> (B, H, T, Dv)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "sink"
        default_type: ClassVar[str | None] = "none"
        needs_lse: ClassVar[bool] = False
        """Whether it asks the kernel for the log(sum(exp(scores))) of each query."""


class NoSink(Sink):
    """The kernel's own result."""

    class Config(Sink.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_heads: int):
        super().__init__()

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return kernel(q, k, v, context)


class LogitSink(Sink):
    """A learned logit s_h per head stands in the softmax beside the scores, with no value behind it.

    The weights become softmax([scores; s_h]) without the last one, which is the kernel's result times
    sigmoid(log(sum(exp(scores))) - s_h). Source: arXiv 2508.10925, section 2.2 (gpt-oss).
    """

    class Config(Sink.Config):
        type: Literal["logit"] = "logit"
        needs_lse: ClassVar[bool] = True

    def __init__(self, config: Config, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.logit = nn.Parameter(torch.empty(n_heads))

    def tp_plan(self) -> Plan:
        return {"logit": heads(self.n_heads)}

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        y, lse = kernel.with_lse(q, k, v, context)
        share = torch.sigmoid(lse - self.logit.float()[:, None])  # (B, H, T), what the sink leaves
        return y * share[..., None].to(y.dtype)

    def param_specs(self) -> dict[str, Spec]:
        return {"logit": Spec("scalar", 1, self.n_heads, 0.0)}
