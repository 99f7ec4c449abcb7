"""Sparse mixtures of experts and their slots."""

from titan_lite.models.ffn.moe.balance import Balance as Balance
from titan_lite.models.ffn.moe.experts import Experts as Experts
from titan_lite.models.ffn.moe.moe import MoE as MoE
from titan_lite.models.ffn.moe.moe import route_evenly as route_evenly
from titan_lite.models.ffn.moe.offset import Offset as Offset
from titan_lite.models.ffn.moe.router import Router as Router
from titan_lite.models.ffn.moe.router import Routing as Routing
from titan_lite.models.ffn.moe.tally import Tally as Tally
