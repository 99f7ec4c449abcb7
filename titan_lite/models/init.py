"""Initial weights: a pure function of (seed, parameter name, shape), whatever the layout.

Each parameter is drawn in blocks of rows, every block from a generator of its own, so that a rank makes only the blocks
its shard touches and all layouts get the same bits. (DTensor's own random init gives every rank of a CPU mesh the same
shard.)
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import xxhash
from torch import Tensor, nn

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.spec import Spec

BLOCK_ELEMENTS = 1 << 20
"""Elements drawn from one generator. Part of the definition of the initial weights: changing it changes them."""


class Init(Component):
    """Fills a block of rows of a parameter."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "init"
        default_type: ClassVar[str | None] = "truncated_normal"

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        """Fills `block` (rows, ...) of a `weight` or `residual` parameter in place."""
        raise NotImplementedError


class TruncatedNormal(Init):
    """N(0, std^2) cut at `cutoff` standard deviations; those that write into the residual stream use std / sqrt(2 L).

    Source: depth scaling from GPT-2 (Radford et al., 2019, section 2.3).
    """

    class Config(Init.Config):
        type: Literal["truncated_normal"] = "truncated_normal"
        std: PositiveFloat = 0.02
        """Standard deviation of every matrix and of the embedding."""
        cutoff: PositiveFloat = 3.0
        """In standard deviations."""
        depth_scaled: bool = True
        """Divide the std of residual matrices by sqrt(2 n_layers)."""

    def __init__(self, config: Config, n_layers: int):
        self.config = config
        self.residual_scale = (2 * n_layers) ** -0.5 if config.depth_scaled else 1.0

    def draw(self, block: Tensor, spec: Spec, generator: torch.Generator) -> None:
        std = self.config.std * (self.residual_scale if spec.start == "residual" else 1.0)
        cut = self.config.cutoff * std
        nn.init.trunc_normal_(block, std=std, a=-cut, b=cut, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, specs: dict[str, Spec], init: Init, seed: int) -> None:
    """Fills every parameter of a materialised model, plain or sharded, in place."""
    # Half a second to import, and checking a config reads this file too.
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for name, parameter in model.named_parameters():
        spec = specs[name]
        shape = parameter.shape
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            local_shape, offset = compute_local_shape_and_global_offset(
                shape, parameter.device_mesh, parameter.placements
            )
        else:
            local, local_shape, offset = parameter, tuple(shape), (0,) * len(shape)
        if isinstance(spec.start, float):
            local.fill_(spec.start)
        elif local.numel():
            _fill(local, name, spec, init, seed, tuple(shape), tuple(local_shape), tuple(offset))


def _fill(
    local: Tensor,
    name: str,
    spec: Spec,
    init: Init,
    seed: int,
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    offset: tuple[int, ...],
) -> None:
    """Writes the part of the parameter `name` that starts at `offset` and has `local_shape`."""
    row = 1
    for size in shape[1:]:
        row *= size
    rows = max(1, BLOCK_ELEMENTS // row)
    first, last = offset[0], offset[0] + local_shape[0]
    columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], local_shape[1:], strict=True))
    for index in range(first // rows, -(-last // rows)):
        start, stop = index * rows, min((index + 1) * rows, shape[0])
        block = torch.empty(stop - start, *shape[1:], dtype=torch.float32)
        key = xxhash.xxh64_intdigest(f"{seed}/{name}/{index}".encode()) >> 1
        init.draw(block, spec, torch.Generator().manual_seed(key))
        low, high = max(start, first), min(stop, last)
        local[low - first : high - first] = block[low - start : high - start][(slice(None), *columns)].to(local.dtype)
