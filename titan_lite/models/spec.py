"""What each parameter is: its role, its fans and how it starts. Read by init, optimizers and FLOP counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Role = Literal["embed", "hidden", "head", "norm", "bias", "scalar", "expert", "router"]
Start = Literal["weight", "residual"] | float


@dataclass(frozen=True)
class Spec:
    """One parameter's description, keyed by its full name in `collect_specs`."""

    role: Role
    fan_in: int
    """Inputs summed into one output; 1 for gains and for embedding rows, which are looked up and not summed."""
    fan_out: int
    start: Start = "weight"
    """`weight`: the init slot's distribution; `residual`: that of a matrix which writes into the residual stream;
    a number: every element."""


def collect_specs(model: nn.Module) -> dict[str, Spec]:
    """One walk over the modules that yields {full parameter name: Spec}, covering every parameter exactly once."""
    specs: dict[str, Spec] = {}
    for path, module in model.named_modules():
        own: dict[str, Spec] = getattr(module, "param_specs", dict)()
        for name, spec in own.items():
            specs[f"{path}.{name}" if path else name] = spec
    names = {name for name, _ in model.named_parameters()}
    assert specs.keys() == names, f"parameters and specs differ: {sorted(specs.keys() ^ names)}"
    return specs
