"""What computes the attention, once queries, keys and values are there."""

from titan_lite.models.attention.kernel.auto import Auto as Auto
from titan_lite.models.attention.kernel.base import Grids as Grids
from titan_lite.models.attention.kernel.base import Kernel as Kernel
from titan_lite.models.attention.kernel.base import PreparedKernel as PreparedKernel
from titan_lite.models.attention.kernel.base import Scoring as Scoring
from titan_lite.models.attention.kernel.eager import Eager as Eager
from titan_lite.models.attention.kernel.flash import FlashAttention as FlashAttention
from titan_lite.models.attention.kernel.flex import Flex as Flex
from titan_lite.models.attention.kernel.sdpa import SDPA as SDPA
