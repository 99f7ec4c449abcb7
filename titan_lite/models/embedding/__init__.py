"""From token ids to the residual stream."""

from titan_lite.models.embedding.base import Embedding as Embedding
from titan_lite.models.embedding.low_rank import LowRankEmbedding as LowRankEmbedding
from titan_lite.models.embedding.position import AbsolutePosition as AbsolutePosition
from titan_lite.models.embedding.table import TableEmbedding as TableEmbedding
from titan_lite.models.embedding.token import TokenEmbedding as TokenEmbedding
from titan_lite.models.embedding.unit import UnitEmbedding as UnitEmbedding
from titan_lite.models.embedding.warm_start import WarmStart as WarmStart
