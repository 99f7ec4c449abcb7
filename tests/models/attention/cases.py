"""Attention written down once more, in float64 and with masks as Python sees them, and kernels on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.attention.kernel import Kernel, Scoring
from titan_lite.models.attention.mask import Mask
from titan_lite.models.attention.score import Score
from titan_lite.models.context import Context
from titan_lite.models.dropout import Noise
from titan_lite.models.position import ScoreBias

B, H, G, DH, DV = 2, 4, 2, 8, 6

MASKS: dict[str, list[Any]] = {
    "causal": ["causal"],
    "document": ["causal", "document"],
    "window": ["causal", {"type": "sliding_window", "window": 5}],
    "window and document": [{"type": "sliding_window", "window": 5}, "document", "causal"],
}
SCORES: dict[str, Any] = {
    "softmax": "softmax",
    "capped": {"type": "softmax_capped", "cap": 1.5},
    "relu_squared": "relu_squared",
    "relu_squared normalized": {"type": "relu_squared", "normalize": True},
    "elu": "elu",
    "elu normalized": {"type": "elu", "normalize": True},
}
COMPUTES = {
    "eager": tuple(SCORES),
    "sdpa": ("softmax",),
    "flex": ("softmax", "capped"),
}
"""The scores that each kernel computes here."""


class Slope(ScoreBias):
    """-(h + 1) / 8 * |i - j|."""

    key = "slope"

    def grid(self, q: Tensor, k: Tensor) -> Tensor:
        return self.element(torch.arange(H)[:, None, None], q, k)

    def element(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return -(head + 1) / 8 * (q - k).abs()


@dataclass
class Case:
    """Random queries, keys and values, and what is to be computed from them."""

    n_tokens: int = 13
    masks: Sequence[Any] = ("causal",)
    score: Any = "softmax"
    bias: ScoreBias = field(default_factory=ScoreBias)
    dropout: float = 0.0
    scale: float = 0.5
    groups: int = G
    value_dim: int = DV
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((H, DH), (self.groups, DH), (self.groups, self.value_dim))
        self.q, self.k, self.v = (
            torch.randn(B, heads, self.n_tokens, width, generator=generator) for heads, width in shapes
        )
        # Two rows with bounds at different places.
        cuts = torch.tensor([[self.n_tokens // 3, self.n_tokens], [self.n_tokens // 2, self.n_tokens - 2]])
        self.documents = (torch.arange(self.n_tokens) >= cuts[:, :, None]).sum(1).int()  # (B, T)

    @property
    def scoring(self) -> Scoring:
        return Scoring(
            scale=self.scale,
            masks=tuple(Mask.Config.choose(mask).build() for mask in self.masks),
            bias=self.bias,
            score=Score.Config.choose(self.score).build(),
            dropout=self.dropout,
        )

    def kernel(self, name: str) -> Kernel:
        return Kernel.Config.choose(name).build(scoring=self.scoring)

    def context(
        self,
        kernel: Kernel,
        start: int = 0,
        stop: int | None = None,
        documents: bool = True,
        noise: Noise | None = None,
    ) -> Context:
        """What a forward over tokens `start` to `stop` tells the kernel."""
        positions = torch.arange(start, self.n_tokens if stop is None else stop)
        given = self.documents if documents else None
        context = Context(positions, given, SimpleNamespace(length=start, grows=False), noise, prepared={}, carry={})
        return context._replace(prepared={kernel.key: kernel.prepare(context)})

    def run(self, name: str, noise: Noise | None = None) -> Tensor:
        kernel = self.kernel(name)
        return kernel(self.q, self.k, self.v, self.context(kernel, noise=noise))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def visible(self) -> Tensor:
        """(B, T, T): which key each query may see, pair by pair."""
        documents = self.documents.tolist()
        tables: list[Mapping[str, Any]] = [mask if isinstance(mask, dict) else {"type": mask} for mask in self.masks]

        def sees(row: int, i: int, j: int) -> bool:
            rules = {
                "causal": lambda mask: j <= i,
                "document": lambda mask: documents[row][i] == documents[row][j],
                "sliding_window": lambda mask: i - j < mask["window"],
            }
            return all(rules[mask["type"]](mask) for mask in tables)

        tokens = range(self.n_tokens)
        return torch.tensor([[[sees(row, i, j) for j in tokens] for i in tokens] for row in range(B)])

    def scores(self) -> Tensor:
        """(B, H, T, T) in float64, -inf where nothing may be seen."""
        q, k = self.q.double(), self.k.double().repeat_interleave(H // self.groups, dim=1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        score = Score.Config.choose(self.score)
        if score.type == "softmax_capped":
            scores = score.cap * torch.tanh(scores / score.cap)
        if self.bias.key:
            positions = torch.arange(self.n_tokens)
            scores = scores + self.bias.grid(positions[:, None], positions[None, :]).double()
        return scores.masked_fill(~self.visible()[:, None], float("-inf"))

    def weights(self) -> Tensor:
        """(B, H, T, T) in float64."""
        scores, score = self.scores(), Score.Config.choose(self.score)
        if score.type.startswith("softmax"):
            return scores.softmax(-1)
        values = scores.clamp(min=0) ** 2 if score.type == "relu_squared" else F.elu(scores) + 1
        if score.normalize:
            return values / (values.sum(-1, keepdim=True) + 1e-6)
        return values / self.visible().sum(-1)[:, None, :, None]

    def steady(self) -> Tensor:
        """(B, H, T): where weights do not hang on the last bits of scores, as quotients of tiny squares do."""
        normalised_squares = self.score == SCORES["relu_squared normalized"]
        sums = self.scores().clamp(min=0).square().sum(-1)
        return (sums == 0) | (sums > 0.01) if normalised_squares else torch.ones_like(sums, dtype=torch.bool)

    def expected(self) -> Tensor:
        """(B, H, T, Dv) in float64."""
        return self.weights() @ self.v.double().repeat_interleave(H // self.groups, dim=1)
