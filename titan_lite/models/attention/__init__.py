"""Attention: the mixer and its slots."""

from titan_lite.models.attention.base import Attention as Attention
from titan_lite.models.attention.gqa import GQA as GQA
from titan_lite.models.attention.kernel import SDPA as SDPA
from titan_lite.models.attention.kernel import Kernel as Kernel
from titan_lite.models.attention.mask import Causal as Causal
from titan_lite.models.attention.mask import Documents as Documents
from titan_lite.models.attention.mask import Mask as Mask
