"""Norms against their formulas in float64, and what their parameters are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from titan_lite.models.norm import Norm
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
"""fp32 against float64."""
DIM = 48


def build(**table: Any) -> nn.Module:
    """The norm with random parameters."""
    norm: nn.Module = Norm.Config.choose(table).build(dim=DIM)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(mean=1.0)
    return norm


def weight(norm: nn.Module, name: str = "weight", default: float = 1.0) -> Tensor:
    value = getattr(norm, name)
    return torch.tensor(default) if value is None else value.detach().double()


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return weight(norm) * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()


def layer(x: Tensor, norm: nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = weight(norm) * centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    return y + weight(norm, "bias", 0.0)


def unit(x: Tensor, norm: nn.Module) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=3.0)


def squashed(x: Tensor, norm: nn.Module) -> Tensor:
    return weight(norm) * torch.tanh(weight(norm, "alpha") * x) + weight(norm, "bias")


GAINS = {"vector": (DIM,), "scalar": (1,), "none": None}
FORMULAS = [
    *(({"type": "rmsnorm", "eps": 0.1, "gain": gain}, rms) for gain in GAINS),
    *(
        ({"type": "layernorm", "eps": 0.1, "gain": gain, "bias": bias}, layer)
        for gain in GAINS
        for bias in (True, False)
    ),
    ({"type": "l2", "eps": 3.0}, unit),
    ({"type": "dyt"}, squashed),
    ({"type": "none"}, lambda x, norm: x),
]


@pytest.mark.parametrize(("table", "formula"), FORMULAS, ids=lambda p: str(p) if isinstance(p, dict) else "")
def test_formula(table: dict[str, Any], formula: Any):
    norm = build(**table)
    x = torch.randn(3, 5, DIM, dtype=torch.float64) * torch.tensor([0.01, 1.0, 30.0])[:, None, None] + 0.5
    torch.testing.assert_close(norm(x.float()).double(), formula(x, norm), atol=ATOL * 30, rtol=ATOL)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "l2"])
def test_statistics_of_bfloat16_are_float32(kind: str):
    """A result is the exact one rounded once to bfloat16, rare ties excepted; bfloat16 statistics miss many."""
    norm = build(type=kind).bfloat16()
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.fill_(float(name == "weight"))
    x = (torch.randn(4, 5, DIM) + 3).bfloat16()
    exact = x.double() - (x.double().mean(-1, keepdim=True) if kind == "layernorm" else 0)
    squares = exact.square().mean(-1, keepdim=True)
    exact = exact / (squares.sqrt() * DIM**0.5 if kind == "l2" else (squares + 1e-5).sqrt())
    y = norm(x)
    assert y.dtype is torch.bfloat16
    assert (y != exact.bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("gain", GAINS)
def test_gain(kind: str, gain: str):
    norm = build(type=kind, gain=gain)
    shapes = {name: tuple(parameter.shape) for name, parameter in norm.named_parameters()}
    expected = {} if GAINS[gain] is None else {"weight": GAINS[gain]}
    assert shapes == expected | ({"bias": (DIM,)} if kind == "layernorm" else {})
    norm(torch.randn(2, DIM, requires_grad=True)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in norm.parameters())


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "l2", "none", "dyt"])
def test_specs(kind: str):
    """Gains begin as ones and offsets as zeros, tanh's factor as configured; nothing of a norm decays."""
    specs = collect_specs(Norm.Config.choose({"type": kind}).build(dim=DIM))
    assert {name: spec.start for name, spec in specs.items()} == {
        "rmsnorm": {"weight": 1.0},
        "layernorm": {"weight": 1.0, "bias": 0.0},
        "l2": {},
        "none": {},
        "dyt": {"alpha": 0.5, "weight": 1.0, "bias": 0.0},
    }[kind]
    assert {spec.role for spec in specs.values()} <= {"norm", "bias", "scalar"}


class Operations(TorchDispatchMode):
    """Lists the ATen operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(function: Any) -> list[str]:
    x, g = torch.randn(2, DIM, requires_grad=True), torch.ones(DIM, requires_grad=True)
    with Operations() as seen:
        function(x, g).sum().backward()
    return seen.names


@pytest.mark.parametrize(
    ("table", "plain"),
    [
        ({"type": "rmsnorm"}, lambda x, g: F.rms_norm(x, (DIM,), g, 1e-5)),
        ({"type": "rmsnorm", "gain": "none"}, lambda x, g: F.rms_norm(x, (DIM,), None, 1e-5)),
        ({"type": "layernorm", "bias": False}, lambda x, g: F.layer_norm(x, (DIM,), g, None, 1e-5)),
        ({"type": "layernorm", "gain": "none", "bias": False}, lambda x, g: F.layer_norm(x, (DIM,), None, None, 1e-5)),
        ({"type": "l2"}, lambda x, g: F.normalize(x, dim=-1)),
        ({"type": "none"}, lambda x, g: x),
    ],
)
def test_operations_are_those_of_torchs_own(table: dict[str, Any], plain: Any):
    norm = build(**table)
    assert operations(lambda x, g: norm(x)) == operations(plain)
