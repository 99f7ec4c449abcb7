"""Next-token prediction."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from titan_lite.objectives.cross_entropy import CrossEntropy


class LanguageModeling:
    """The summed cross entropy of a micro-batch's targets."""

    def __init__(self, cross_entropy: CrossEntropy):
        self.cross_entropy = cross_entropy

    def __call__(self, model: nn.Module, tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        """tokens, targets, documents (B, T) -> scalar sum over the targets that are not -100."""
        return model(tokens, documents, consume=partial(self.cross_entropy, targets=targets))
