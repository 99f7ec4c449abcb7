"""Placements against their formulas, and how gradients at the start depend on depth."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.context import Context, NoMemory
from titan_lite.models.dropout import Noise
from titan_lite.models.norm import LayerNorm, Norm, RMSNorm
from titan_lite.models.residual import Residual

ATOL = 1e-5
"""fp32, one module."""
DIM = 24
PLACEMENTS = ("pre", "post", "peri", "sandwich_sum", "out_only", "none")


def build(norm: Norm.Config, **table: Any) -> tuple[Residual, Residual]:
    """A layer's two residuals with random parameters."""
    pair = Residual.Config.choose(table).pair(DIM, norm, n_layers=4)
    with torch.no_grad():
        for residual in pair:
            for parameter in residual.parameters():
                parameter.normal_(mean=1.0, std=0.3)
    return pair


def context(noise: Noise | None = None) -> Context:
    return Context(torch.arange(5), None, NoMemory(), noise, prepared={}, carry={})


def nothing(x: Tensor, context: Context) -> Tensor:
    return torch.zeros_like(x)


def branch(x: Tensor, context: Context) -> Tensor:
    return torch.sin(3 * x).roll(1, -1)


def sin(x: Tensor) -> Tensor:
    return branch(x, context())


def rms(x: Tensor, gain: nn.Module) -> Tensor:
    return gain.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


FORMULAS = {
    "pre": lambda x, m: x + sin(rms(x, m.norm)) / 2,
    "post": lambda x, m: rms(x + sin(x) / 2, m.norm),
    "peri": lambda x, m: x + rms(sin(rms(x, m.norm_in)), m.norm_out) / 2,
    "sandwich_sum": lambda x, m: rms(x + sin(rms(x, m.norm_in)) / 2, m.norm_sum),
    "out_only": lambda x, m: x + rms(sin(x), m.norm) / 2,
    "none": lambda x, m: x + sin(x) / 2,
}
IDLE = {"post": lambda x, m: m.norm(x), "sandwich_sum": lambda x, m: m.norm_sum(x)}
"""What stays of a layer whose branch is zero; of the other placements, x."""


@pytest.mark.parametrize("name", PLACEMENTS)
def test_formula(name: str):
    x = torch.randn(2, 5, DIM)
    for residual in build(RMSNorm.Config(), type=name, scale={"type": "constant", "value": 0.5}):
        torch.testing.assert_close(residual(x, branch, context()), FORMULAS[name](x, residual), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("norm", [RMSNorm.Config(), LayerNorm.Config(bias=False)], ids=["rmsnorm", "layernorm"])
def test_zero_branch(name: str, norm: Norm.Config):
    x = torch.randn(2, 5, DIM)
    for residual in build(norm, type=name):
        assert torch.equal(residual(x, nothing, context()), IDLE.get(name, lambda x, _: x)(x, residual))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_norms_and_final_norm(name: str):
    """How many norms a layer has, and that the model ends with one where no layer does."""
    model = tiny_model(residual=name)
    assert (
        sum(isinstance(module, RMSNorm) for module in model.stack.blocks["0"].modules())
        == {
            "pre": 2,
            "post": 2,
            "peri": 4,
            "sandwich_sum": 4,
            "out_only": 2,
            "none": 0,
        }[name]
    )
    assert isinstance(model.norm, RMSNorm) == (name not in ("post", "sandwich_sum"))
    x = model(torch.randint(VOCAB, (2, 5)), consume=lambda x, *_: x)
    if name != "none":
        torch.testing.assert_close(x.square().mean(-1), torch.ones(2, 5), atol=0.05, rtol=0)


def test_a_final_norm_that_is_asked_for_is_there():
    assert isinstance(tiny_model(residual="post", final_norm="layernorm").norm, LayerNorm)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_dropout_acts_on_what_is_added(name: str):
    """Elements of the addition are dropped, the others doubled, differently in the two branches; not in evaluation."""
    x = torch.randn(4, 5, DIM)
    noise = Noise.of(0, torch.device("cpu"), 0, torch.arange(4))
    pair = build(Norm.Config.choose("none"), type=name, dropout=0.5)
    dropped = []
    for residual in pair:
        added = residual(x, branch, context(noise)) - x
        kept = added.abs() > 0
        torch.testing.assert_close(added, kept * 2 * sin(x), atol=ATOL, rtol=0)
        assert 0.4 < kept.float().mean() < 0.6
        torch.testing.assert_close(residual(x, branch, context()), x + sin(x))
        dropped.append(~kept)
    assert not torch.equal(*dropped)


def last_gradient(residual: str, n_layers: int, seed: int) -> float:
    """Norm of the loss's gradient of the last layer's last matrix, matrices drawn as Xavier says."""
    torch.manual_seed(seed)
    model = tiny_model(
        dim=64, n_layers=n_layers, residual=residual, norm="layernorm", attention={"n_heads": 4}, ffn={"hidden": 128}
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_normal_(parameter)
    tokens = torch.randint(VOCAB, (4, 17))
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradient = model.stack.blocks[str(n_layers - 1)].ffn.down.weight.grad
    return gradient.norm().item()


@pytest.mark.parametrize(("residual", "slope"), [("pre", -0.5), ("post", 0.0)])
def test_gradient_at_the_start_against_depth(residual: str, slope: float):
    """The last layer's gradient falls as 1 / sqrt(L) with pre, and is the same for all L with post: 2002.04745."""
    depths = [4, 8, 16, 32]
    norms = [numpy.mean([numpy.log(last_gradient(residual, depth, seed)) for seed in range(2)]) for depth in depths]
    assert numpy.polyfit(numpy.log(depths), norms, 1)[0] == pytest.approx(slope, abs=0.2)


@pytest.mark.parametrize("name", ["post", "sandwich_sum"])
def test_rezero_is_refused_where_the_sum_is_normalised(name: str):
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"residual": {"type": name, "scale": "rezero"}}})
    (problem,) = caught.value.problems
    assert problem.key == "model.residual.scale.type"
    assert f'residual.type = "{name}"' in problem.why


def test_sums_that_nothing_bounds_are_warned_of():
    def warnings(scale: str) -> tuple[str, ...]:
        return job_from_dict({"model": {"residual": {"type": "none", "scale": scale}}}).warnings

    assert any(line.startswith('model.residual.type = "none"') for line in warnings("none"))
    assert not any(line.startswith("model.residual") for line in warnings("rezero"))


def test_configs_default_to_pre():
    assert tiny_config().residual == Residual.Config.choose("pre")
