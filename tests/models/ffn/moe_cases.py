"""Small expert layers for tests, and the context they are run in."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from titan_lite.models.context import Context, NoMemory
from titan_lite.models.ffn import FFN
from titan_lite.models.init import Normal, initialize
from titan_lite.models.linear import DefaultLinear
from titan_lite.models.module import after_step
from titan_lite.models.spec import collect_specs

D = 24
M = TypeVar("M", bound=nn.Module)


def make(type_: str, dim: int = D, std: float = 0.4, **table: Any) -> Any:
    """A branch whose weights make choices clear and every activation bend, with biases that are not 0."""
    ffn = FFN.Config.choose({"type": type_} | table).build(dim=dim, linear=DefaultLinear.Config())
    return filled(ffn, dim, std)


def filled(module: M, dim: int = D, std: float = 0.4) -> M:
    initialize(
        module, collect_specs(module), Normal(Normal.Config(std=std, depth_scaled=False), dim=dim, n_layers=1), 0
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=std, generator=torch.Generator().manual_seed(len(name)))
    after_step(module, lambda tensor: tensor)
    return module


def inputs(rows: int = 3, length: int = 7, dim: int = D, seed: int = 1) -> Tensor:
    """(rows, length, dim), standard normal."""
    return torch.randn(rows, length, dim, generator=torch.Generator().manual_seed(seed))


def context(token_weight: float | None = None) -> Context:
    """Of training with this weight of a token, or of no training."""
    weight = None if token_weight is None else torch.tensor(token_weight)
    return Context(torch.arange(7), None, NoMemory(), None, prepared={}, carry={}, token_weight=weight)
