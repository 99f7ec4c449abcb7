"""Branch scales: closed forms, what ReZero promises, and one-element parameters in every layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from tests.runs import Run, train
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.residual import BranchScale
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer
from titan_lite.optim.groups import parameter_groups

RTOL = 1e-5
"""fp32: losses of a few steps in another layout."""
WEIGHT_ATOL = 2e-4
"""fp32: weights after a few steps of Adam at lr 1e-2."""
REZERO = {"type": "none", "scale": "rezero"}
PER_LAYER = {"type": "none", "scale": {"type": "rezero", "per": "layer"}}


def alphas(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("alpha")}


def gradients(model: Transformer) -> None:
    tokens = torch.randint(VOCAB, (4, 9))
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


@pytest.mark.parametrize(
    ("table", "factor"),
    [
        ({"type": "none"}, 1.0),
        ({"type": "rezero", "init": 0.25}, 0.25),
        ({"type": "rezero", "init": 0.25, "lr_multiplier": 10.0}, 0.25),
        ({"type": "layerscale", "init": 0.1}, 0.1),
        ({"type": "constant", "value": 0.22}, 0.22),
        ({"type": "constant", "value": "inverse_sqrt_depth"}, 0.25),
        ({"type": "constant", "value": "inverse_depth"}, 0.0625),
    ],
)
def test_first_factor(table: dict[str, Any], factor: float):
    x = torch.randn(2, 3, 8)
    for scale in BranchScale.Config.choose(table).pair(dim=8, n_layers=16):
        with torch.no_grad():
            for name, spec in collect_specs(scale).items():
                scale.get_parameter(name).fill_(spec.start)
        torch.testing.assert_close(scale(x), x * factor)


def test_layer_scale_has_a_factor_per_channel():
    scale = BranchScale.Config.choose("layerscale").build(dim=8, n_layers=16)
    factors = torch.arange(8.0)
    with torch.no_grad():
        scale.weight.copy_(factors)
    assert torch.equal(scale(torch.ones(2, 3, 8)), factors.expand(2, 3, 8))


@pytest.mark.parametrize("residual", [REZERO, PER_LAYER, {"type": "pre", "scale": "rezero"}])
def test_rezero_begins_as_the_identity(residual: dict[str, Any]):
    """The stack changes no bit, so that depth does not matter; only the factors learn from the first step."""
    model, deeper = (tiny_model(residual=residual, n_layers=n) for n in (2, 5))
    tokens = torch.randint(VOCAB, (2, 7))
    x = model.embedding(tokens, model.context(tokens))
    assert torch.equal(model.stack(x, model.context(tokens)).x, x)
    assert torch.equal(model(tokens), deeper(tokens))
    gradients(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == (name.endswith("alpha") or "blocks" not in name), name
    torch.optim.Adam(model.parameters(), 1e-3).step()
    assert len(alphas(model)) == (2 if residual is PER_LAYER else 4)
    assert all(alpha.item() != 0 for alpha in alphas(model).values())


@pytest.mark.parametrize("multiplier", [1.0, 5.0])
def test_rezeros_learning_rate(multiplier: float):
    """Adam's first step moves every parameter by lr, so the factor by multiplier * lr."""
    model = tiny_model(residual={"type": "none", "scale": {"type": "rezero", "lr_multiplier": multiplier}})
    gradients(model)
    torch.optim.Adam(model.parameters(), 1e-3, eps=1e-12).step()
    for block in model.stack.blocks.values():
        for residual in (block.attention_residual, block.ffn_residual):
            assert abs(residual.scale(torch.ones(1)).item()) == pytest.approx(multiplier * 1e-3, rel=1e-4)


def test_one_rezero_factor_for_both_branches():
    """It acts on both, learns from both, and is a parameter once: also in a copy, and after `to_empty`."""
    config = tiny_config(residual=PER_LAYER)
    with torch.device("meta"):
        from_meta = config.build(vocab_size=VOCAB)
    from_meta.to_empty(device="cpu")
    reference = tiny_model(residual=REZERO)
    for model in (from_meta, copy.deepcopy(tiny_model(residual=PER_LAYER))):
        assert list(alphas(model)) == [f"stack.blocks.{i}.attention_residual.scale.alpha" for i in range(2)]
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.fill_(0.3) if name.endswith("alpha") else None
                if name in dict(model.named_parameters()):
                    model.get_parameter(name).copy_(parameter)
        model.zero_grad()
        reference.zero_grad()
        torch.manual_seed(0)
        gradients(model)
        torch.manual_seed(0)
        gradients(reference)
        for index in range(2):
            first, second = (
                reference.get_parameter(f"stack.blocks.{index}.{branch}_residual.scale.alpha").grad
                for branch in ("attention", "ffn")
            )
            shared = model.get_parameter(f"stack.blocks.{index}.attention_residual.scale.alpha").grad
            torch.testing.assert_close(shared, first + second)


def test_factors_do_not_decay():
    model = tiny_model(residual=REZERO)
    groups = parameter_groups(model, collect_specs(model), weight_decay=0.1)
    (plain,) = (group["params"] for group in groups if group["weight_decay"] == 0)
    assert {id(alpha) for alpha in alphas(model).values()} <= {id(parameter) for parameter in plain}


def deep_losses(scale: str, steps: int) -> list[float]:
    """Adam without warm-up on one batch: 64 layers of width 32 without any norm, drawn as Xavier says."""
    torch.manual_seed(0)
    residual = {"type": "none", "scale": scale}
    attention, ffn = {"n_heads": 4}, {"hidden": 64}
    model = tiny_model(n_layers=64, residual=residual, norm="none", attention=attention, ffn=ffn)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
    nn.init.normal_(model.embedding.weight)
    tokens = torch.randint(VOCAB, (4, 17))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses: list[Tensor] = []
    for _ in range(steps):
        losses.append(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).tolist()


def test_64_layers_without_norms_learn_with_rezero_only():
    losses = deep_losses("rezero", 12)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3
    vanilla = deep_losses("none", 2)
    assert not vanilla[-1] < vanilla[0]  # they are not numbers


TINY = {
    "rezero per sublayer": {"residual": REZERO},
    "rezero per layer": {"residual": PER_LAYER},
    "parallel": {"residual": PER_LAYER, "block": "parallel"},
    "scalar gains": {
        "norm": {"type": "rmsnorm", "gain": "scalar"},
        "residual": {"scale": "layerscale"},
        "block": "parallel_shared_norm",
    },
    "dyt": {"norm": "dyt", "residual": "peri"},
}


def sections(model: dict[str, Any], local_batch_size: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "training": {"local_batch_size": local_batch_size, "global_batch_size": 8}} | more


def assert_equal_runs(run: Run, reference: Run) -> None:
    torch.testing.assert_close(run.losses, reference.losses, rtol=RTOL, atol=0)
    torch.testing.assert_close(run.norms, reference.norms, rtol=10 * RTOL, atol=0)
    for name, weight in reference.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=WEIGHT_ATOL, msg=name)


@pytest.mark.parametrize("model", TINY.values(), ids=TINY)
def test_one_element_parameters_in_other_layouts(pool2, model: dict[str, Any]):
    """Shards of one element leave a rank with none; a reference to another module's parameter is seen by no wrapper."""
    reference = train(sections(model, 8), 3)
    assert any(weight.numel() == 1 for weight in reference.weights.values())
    for run in pool2.run(train, sections(model, 4), 3):
        assert_equal_runs(run, reference)
    checkpointed = {"activation_checkpoint": {"mode": "full"}, "compile": {"enable": True, "backend": "aot_eager"}}
    assert_equal_runs(train(sections(model, 8, **checkpointed), 3), reference)


@pytest.mark.parametrize(
    "scale",
    [
        {"type": "constant"},
        {"type": "constant", "value": 0.0},
        {"type": "layerscale", "init": 0.0},
        {"type": "rezero", "per": "model"},
    ],
)
def test_values_that_are_refused(scale: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"model\.residual\.scale\."):
        job_from_dict({"model": {"residual": {"scale": scale}}})
