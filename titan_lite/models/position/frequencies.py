"""Whether rotary frequencies are constants or are learned."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from titan_lite.models.module import Module, OnTokens
from titan_lite.models.position.rotation import Tables
from titan_lite.models.position.scaling import Scaling
from titan_lite.models.spec import Spec

Kind: TypeAlias = Literal["fixed", "learned"]


class FixedFrequencies(Module):
    """cos and sin of all angles are made once per forward, for all layers."""

    def __init__(self, scaling: Scaling, width: int):
        super().__init__()
        self.scaling = scaling

    def prepare(self, angles: Tensor, length: int) -> Tables:
        """What all layers share, of angles (T, width/2) in a text of `length` tokens."""
        return self.scaling.cos_sin(angles, length)

    def forward(self, prepared: Tables, length: int) -> Tables:
        return prepared


class LearnedFrequencies(OnTokens):
    """Each layer turns by f_j * exp(log_factor_j). Source: MegaTransformer (github.com/Mekadrom/megatransformer).

    log_factor starts at 0. The logarithm is ours: a step of the optimizer changes fast and slow frequencies in
    proportion, and none falls below zero. Mixed precision rounds log_factor to its dtype: with bfloat16, to 3 digits of
    the change, not of the frequency.
    """

    def __init__(self, scaling: Scaling, width: int):
        super().__init__()
        self.scaling = scaling
        self.log_factor = nn.Parameter(torch.empty(width // 2))

    def prepare(self, angles: Tensor, length: int) -> Tensor:
        """The angles themselves: parameters are whole only inside their layer's forward."""
        return angles

    def forward(self, prepared: Tensor, length: int) -> Tables:
        return self.scaling.cos_sin(prepared * self.log_factor.float().exp(), length)

    def param_specs(self) -> dict[str, Spec]:
        return {"log_factor": Spec("scalar", 1, self.log_factor.shape[0], 0.0)}


FREQUENCIES: dict[Kind, type[FixedFrequencies] | type[LearnedFrequencies]] = {
    "fixed": FixedFrequencies,
    "learned": LearnedFrequencies,
}
