"""How a branch joins the residual stream: where its norms stand, and how it is scaled."""

from titan_lite.models.residual.base import Residual as Residual
from titan_lite.models.residual.placements import PreNorm as PreNorm
from titan_lite.models.residual.scale import BranchScale as BranchScale
from titan_lite.models.residual.scale import NoScale as NoScale
