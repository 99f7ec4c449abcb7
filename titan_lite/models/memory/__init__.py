"""What segments of a text remember of those before them."""

from titan_lite.models.memory.base import LaneMemory as LaneMemory
from titan_lite.models.memory.base import NoLaneMemory as NoLaneMemory
from titan_lite.models.memory.long_term import LongTerm as LongTerm
from titan_lite.models.memory.xl import XL as XL
