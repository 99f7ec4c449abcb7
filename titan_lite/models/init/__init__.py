"""Initial weights."""

from titan_lite.models.init.base import Distribution as Distribution
from titan_lite.models.init.base import Init as Init
from titan_lite.models.init.base import InitRule as InitRule
from titan_lite.models.init.fans import FanIn as FanIn
from titan_lite.models.init.fans import KaimingNormal as KaimingNormal
from titan_lite.models.init.fans import KaimingUniform as KaimingUniform
from titan_lite.models.init.fans import XavierNormal as XavierNormal
from titan_lite.models.init.fans import XavierUniform as XavierUniform
from titan_lite.models.init.fill import initialize as initialize
from titan_lite.models.init.normal import Like as Like
from titan_lite.models.init.normal import Normal as Normal
from titan_lite.models.init.normal import TruncatedNormal as TruncatedNormal
from titan_lite.models.init.normal import Zeros as Zeros
from titan_lite.models.init.orthogonal import Orthogonal as Orthogonal
