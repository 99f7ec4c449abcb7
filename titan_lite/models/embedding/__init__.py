"""From token ids to the residual stream."""

from titan_lite.models.embedding.token import Embedding as Embedding
from titan_lite.models.embedding.token import TokenEmbedding as TokenEmbedding
