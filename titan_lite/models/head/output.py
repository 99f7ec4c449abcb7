"""How logits come from hidden states, in a form that a chunked loss can take the derivative of, and rewards."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.head.reward import Rewards, no_rewards
from titan_lite.models.ranks import ALONE, Ranks


class LogitFunction:
    """An elementwise function of float32 logits (..., V), with a parameter (V,) or without."""

    def __call__(self, u: Tensor, parameter: Tensor | None) -> Tensor:
        """The function, differentiable; `u` stays as it is."""
        raise NotImplementedError

    def backward_(self, grad: Tensor, u: Tensor, parameter: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of u and of the parameter, given that of the result, all (N, V). Overwrites `grad` and `u`."""
        raise NotImplementedError


class Link(NamedTuple):
    """One function of the chain that logits go through."""

    function: LogitFunction
    parameter: Tensor | None = None


class Output(NamedTuple):
    """logits = links(x W^T). A head makes it in its forward, where its parameters are whole."""

    weight: Tensor
    """W (V, D)."""
    links: tuple[Link, ...] = ()
    """From x W^T to logits, the first one first; a bias is one of them."""
    ranks: Ranks = ALONE
    """Those that have a part of the rows of W each, and of the links' parameters."""
    rewards: Rewards = no_rewards
    """Of the texts in the rows of x."""

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V), in float32 where there are links."""
        return self.ranks.whole(through(self.links, F.linear(x, self.weight)))


def through(links: tuple[Link, ...], u: Tensor) -> Tensor:
    """The logits that become of u (..., V)."""
    for function, parameter in links:
        u = function(u.float(), parameter)
    return u
