"""Attention: the mixer and its slots."""

from titan_lite.models.attention.base import Attention as Attention
from titan_lite.models.attention.fused import FusedGQA as FusedGQA
from titan_lite.models.attention.gate import Gate as Gate
from titan_lite.models.attention.gqa import GQA as GQA
from titan_lite.models.attention.gqa import GroupedAttention as GroupedAttention
from titan_lite.models.attention.kernel import SDPA as SDPA
from titan_lite.models.attention.kernel import Kernel as Kernel
from titan_lite.models.attention.mask import Causal as Causal
from titan_lite.models.attention.mask import Documents as Documents
from titan_lite.models.attention.mask import Mask as Mask
from titan_lite.models.attention.qk_norm import QKNorm as QKNorm
from titan_lite.models.attention.registers import Registers as Registers
from titan_lite.models.attention.score import Score as Score
from titan_lite.models.attention.sink import Sink as Sink
from titan_lite.models.attention.value import ValueMix as ValueMix
from titan_lite.models.attention.value import ValueResidual as ValueResidual
