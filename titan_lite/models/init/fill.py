"""Initial weights: a pure function of (seed, parameter name, shape), whatever the layout.

Each parameter is drawn in blocks of rows, every block from a generator of its own, so that a rank makes only the blocks
its shard touches and all layouts get the same bits. (DTensor's own random init gives every rank of a CPU mesh the same
shard.)
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor, nn

from titan_lite.config.errors import ConfigError
from titan_lite.models.init.base import Distribution, Init
from titan_lite.models.init.normal import Normal
from titan_lite.models.init.rules import idle_rules
from titan_lite.models.spec import Gaussian, Spec, named_state


@torch.no_grad()
def initialize(model: nn.Module, specs: dict[str, Spec], init: Distribution, seed: int) -> None:
    """Fills every parameter and buffer of a materialised model, plain or sharded, in place.

    `specs` are those of the whole model, of which `model` may be a part. Raises ConfigError for a rule that has nothing
    to decide.
    """
    # Half a second to import, and checking a config reads this file too.
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if problems := list(idle_rules([rule for rule, _ in init.rules], specs)):
        raise ConfigError(problems)
    for name, parameter in named_state(model):
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
            _fill(local, name, spec, _drawn_by(init, name, spec), seed, tuple(shape), tuple(local_shape), tuple(offset))


def _drawn_by(init: Distribution, name: str, spec: Spec) -> Init:
    if isinstance(spec.start, Gaussian):
        return Normal.Config(std=spec.start.std, depth_scaled=False).build(dim=init.dim, n_layers=init.n_layers)
    return init.choose(name, spec)


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
    rows = init.rows(shape)
    first, last = offset[0], offset[0] + local_shape[0]
    columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], local_shape[1:], strict=True))
    for index in range(first // rows, -(-last // rows)):
        start, stop = index * rows, min((index + 1) * rows, shape[0])
        block = torch.empty(stop - start, *shape[1:], dtype=torch.float32)
        key = xxhash.xxh64_intdigest(f"{seed}/{name}/{index}".encode()) >> 1
        init.draw(block, spec, torch.Generator().manual_seed(key))
        low, high = max(start, first), min(stop, last)
        local[low - first : high - first] = block[low - start : high - start][(slice(None), *columns)].to(local.dtype)
