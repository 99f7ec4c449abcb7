"""How a branch joins the residual stream: where its norms stand, and how it is scaled."""

from titan_lite.models.residual.admin import Admin as Admin
from titan_lite.models.residual.base import AdditiveResidual as AdditiveResidual
from titan_lite.models.residual.base import Residual as Residual
from titan_lite.models.residual.branch_scale import BranchScale as BranchScale
from titan_lite.models.residual.branch_scale import ConstantScale as ConstantScale
from titan_lite.models.residual.branch_scale import LayerScale as LayerScale
from titan_lite.models.residual.branch_scale import NoScale as NoScale
from titan_lite.models.residual.branch_scale import ReZero as ReZero
from titan_lite.models.residual.ngpt import NGPTResidual as NGPTResidual
from titan_lite.models.residual.placements import Normless as Normless
from titan_lite.models.residual.placements import OutNorm as OutNorm
from titan_lite.models.residual.placements import PeriNorm as PeriNorm
from titan_lite.models.residual.placements import PostNorm as PostNorm
from titan_lite.models.residual.placements import PreNorm as PreNorm
from titan_lite.models.residual.placements import SandwichSum as SandwichSum
