"""Feed-forward branches."""

from titan_lite.models.ffn.base import FFN as FFN
from titan_lite.models.ffn.glu import GLU as GLU
from titan_lite.models.ffn.glu import ClampedSwiGLU as ClampedSwiGLU
from titan_lite.models.ffn.mlp import MLP as MLP
from titan_lite.models.ffn.moe import MoE as MoE
from titan_lite.models.ffn.peer import PEER as PEER
from titan_lite.models.ffn.scaled import ScaledGLU as ScaledGLU
