"""Predicting more than the next token."""

from titan_lite.models.mtp.base import MTP as MTP
from titan_lite.models.mtp.base import NoMTP as NoMTP
from titan_lite.models.mtp.heads import ParallelHeads as ParallelHeads
from titan_lite.models.mtp.modules import SequentialModules as SequentialModules
