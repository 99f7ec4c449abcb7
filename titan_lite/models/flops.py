"""FLOPs per token by formula: 6 per parameter of a matrix, plus attention scores (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from torch import nn

from titan_lite.models.attention import Attention
from titan_lite.models.spec import Spec

MATRIX_ROLES = ("hidden", "head", "expert", "router")


def training_flops_per_token(model: nn.Module, specs: dict[str, Spec], seq_len: int) -> int:
    """Forward and backward FLOPs per token: 3 x (2 per weight in matrices + scores), attention over the full row."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # Rows of an embedding (fan_in 1) are looked up: no product, but where a tied head makes it one.
    matrices = {n for n, s in specs.items() if s.role in MATRIX_ROLES or (s.role == "embed" and s.fan_in > 1)}
    if getattr(model, "tied", False):
        matrices.add("embedding.weight")
    weights = sum(round(sizes[name] * specs[name].used) for name in matrices)
    scores = sum(m.score_flops_per_token(seq_len) for m in model.modules() if isinstance(m, Attention))
    return 3 * (2 * weights + scores)
