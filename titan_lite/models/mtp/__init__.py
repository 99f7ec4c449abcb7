"""Predicting more than the next token."""

from titan_lite.models.mtp.base import MTP as MTP
from titan_lite.models.mtp.base import NoMTP as NoMTP
from titan_lite.models.mtp.drafts import NO_DRAFTS as NO_DRAFTS
from titan_lite.models.mtp.drafts import Drafts as Drafts
from titan_lite.models.mtp.drafts import Further as Further
from titan_lite.models.mtp.drafts import nothing_further as nothing_further
from titan_lite.models.mtp.heads import ParallelHeads as ParallelHeads
from titan_lite.models.mtp.modules import SequentialModules as SequentialModules
