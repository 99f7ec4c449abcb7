"""Folds: what of a model can go into its weights, so that a published architecture computes the same."""

from typing import Final

from titan_lite.hf.folds.base import Fold as Fold
from titan_lite.hf.folds.base import Shape as Shape
from titan_lite.hf.folds.embedding import NormedRows, ScaledRows, WideRows, WrittenOutSinusoids
from titan_lite.hf.folds.head import ScaledLogits
from titan_lite.hf.folds.norms import SpreadGains
from titan_lite.hf.folds.residual import FoldedAdmin, ScaledBranches
from titan_lite.hf.folds.sharing import Unshared

FOLDS: Final[tuple[Fold, ...]] = (
    Unshared(),
    SpreadGains(),
    WideRows(),
    NormedRows(),
    ScaledRows(),
    WrittenOutSinusoids(),
    ScaledBranches(),
    FoldedAdmin(),
    ScaledLogits(),
)
"""In the order in which they are applied: what one leaves is what the next one sees."""
