"""Turning pairs of a head's numbers: which two numbers are a pair, and how many of them there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Tables: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin of the angles, each (T, width/2) in float32."""
Rotation: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (..., T, Dh), cos, sin) -> x with its pairs turned, in float32, back in x's dtype."""
Layout: TypeAlias = Literal["half_split", "interleaved"]


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (j, j + Dh/2). As in GPT-NeoX (arXiv 2204.06745) and Hugging Face's Llama."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (2j, 2j + 1). As in RoFormer (arXiv 2104.09864), GPT-J and Meta's Llama."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_part(rotate: Rotation, width: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first `width` numbers of each head and passes the others on. Source: arXiv 2204.06745."""
    turned, rest = x.split((width, x.shape[-1] - width), dim=-1)
    return torch.cat((rotate(turned, cos, sin), rest), dim=-1)


LAYOUTS: dict[Layout, Rotation] = {"half_split": rotate_half_split, "interleaved": rotate_interleaved}


def rotation(layout: Layout, width: int, head_dim: int) -> Rotation:
    """That of the first `width` numbers of heads of `head_dim`."""
    rotate = LAYOUTS[layout]
    return rotate if width == head_dim else partial(rotate_part, rotate, width)
