"""How likely a model finds texts: token by token, by document and over all, and for evaluation harnesses."""

from titan_lite.evaluation.scoring import Scorer, scorer
from titan_lite.evaluation.windows import Window, windows

__all__ = ["Scorer", "Window", "scorer", "windows"]
