"""What is minimised."""

from titan_lite.objectives.lm import LanguageModeling as LanguageModeling
from titan_lite.objectives.objective import Objective as Objective
from titan_lite.objectives.reward import RewardModeling as RewardModeling
