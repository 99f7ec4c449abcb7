"""From the last hidden states to what the objective reads."""

from titan_lite.models.head.lm import Head as Head
from titan_lite.models.head.lm import LMHead as LMHead
