"""What each parameter is: its role, its fans and how it starts. Read by init, optimizers and FLOP counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from titan_lite.models.transformer import Transformer

Role = Literal["embed", "hidden", "head", "norm", "bias", "scalar", "expert", "router"]


@dataclass(frozen=True)
class Gaussian:
    """A parameter that starts from N(0, std^2), whatever the init slot."""

    std: float


Start = Literal["weight", "residual"] | float | Gaussian


@dataclass(frozen=True)
class Spec:
    """One parameter's description, keyed by its full name in `collect_specs`."""

    role: Role
    fan_in: int
    """Inputs summed into one output; 1 for gains and for embedding rows, which are looked up and not summed."""
    fan_out: int
    start: Start = "weight"
    """`weight`: the init slot's distribution; `residual`: that of a matrix which writes into the residual stream;
    a number: every element; a `Gaussian`: that one."""
    used: float = 1.0
    """How often a token passes through it on average: experts serve only those that chose them (less than 1), and
    PEER's heads share one table of keys (more than 1)."""


def collect_specs(model: nn.Module) -> dict[str, Spec]:
    """One walk over the modules: {full name: Spec}, covering every parameter and every buffer exactly once."""
    specs: dict[str, Spec] = {}
    for path, module in model.named_modules():
        own: dict[str, Spec] = getattr(module, "param_specs", dict)()
        for name, spec in own.items():
            specs[f"{path}.{name}" if path else name] = spec
    names = {name for name, _ in named_state(model)}
    assert specs.keys() == names, f"parameters and specs differ: {sorted(specs.keys() ^ names)}"
    return specs


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their full names: all that init fills and a checkpoint holds, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def specs_of(config: Transformer.Config) -> dict[str, Spec] | None:
    """The specs of the model that a config describes; None where it cannot be built, which other checks report.

    For checks of a config: builds the model without storage, about half a millisecond a layer.
    """
    model = meta_model(config)
    return None if model is None else collect_specs(model)


def meta_model(config: Transformer.Config) -> Transformer | None:
    """The model that a config describes, without storage; None where it cannot be built."""
    try:
        with torch.device("meta"):
            model: Transformer = config.build(vocab_size=config.vocab_size or 64)
    except Exception:
        return None
    return model
