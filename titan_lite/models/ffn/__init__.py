"""Feed-forward branches."""

from titan_lite.models.ffn.base import FFN as FFN
from titan_lite.models.ffn.glu import GLU as GLU
