"""Scaling of rotary frequencies, so that a model reaches beyond the length it was trained on."""

from titan_lite.models.position.scaling.band import Llama3 as Llama3
from titan_lite.models.position.scaling.band import YaRN as YaRN
from titan_lite.models.position.scaling.base import LinearScaling as LinearScaling
from titan_lite.models.position.scaling.base import NoScaling as NoScaling
from titan_lite.models.position.scaling.base import Scaling as Scaling
from titan_lite.models.position.scaling.ntk import LSWT as LSWT
from titan_lite.models.position.scaling.ntk import NTK as NTK
from titan_lite.models.position.scaling.ntk import DynamicNTK as DynamicNTK
