"""Position encodings of the attention scores."""

from titan_lite.models.position.alibi import ALiBi as ALiBi
from titan_lite.models.position.base import Position as Position
from titan_lite.models.position.base import ScoreBias as ScoreBias
from titan_lite.models.position.none import NoPosition as NoPosition
from titan_lite.models.position.rope import RoPE as RoPE
