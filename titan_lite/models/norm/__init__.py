"""Normalisation over the model width."""

from titan_lite.models.norm.base import NoNorm as NoNorm
from titan_lite.models.norm.base import Norm as Norm
from titan_lite.models.norm.dyt import DyT as DyT
from titan_lite.models.norm.l2 import L2Norm as L2Norm
from titan_lite.models.norm.layer import LayerNorm as LayerNorm
from titan_lite.models.norm.rms import RMSNorm as RMSNorm
