"""From the last hidden states to what the objective reads."""

from titan_lite.models.head.lm import Head as Head
from titan_lite.models.head.lm import LMHead as LMHead
from titan_lite.models.head.logit_cap import LogitCap as LogitCap
from titan_lite.models.head.logit_scale import LogitScale as LogitScale
from titan_lite.models.head.output import Output as Output
from titan_lite.models.head.reward import RewardHead as RewardHead
