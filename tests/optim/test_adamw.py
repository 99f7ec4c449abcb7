"""AdamW and its groups."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import tiny_model
from titan_lite.models.spec import collect_specs
from titan_lite.optim.adamw import AdamW
from titan_lite.optim.groups import parameter_groups


def test_gains_do_not_decay_and_every_parameter_is_in_one_group():
    model = tiny_model()
    decayed, plain = parameter_groups(model, collect_specs(model), 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[0].rpartition(".")[2] for p in plain["params"]} == {"norm"}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_step_against_the_update_rule(implementation: str):
    weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.1, -0.2, 0.0])
    parameter = torch.nn.Parameter(weight.clone())
    config = AdamW.Config(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.5, implementation=implementation)
    optimizer = config.build(groups=[{"params": [parameter], "weight_decay": 0.5}])
    m, v = torch.zeros(3), torch.zeros(3)
    expected = weight.clone()
    for t in range(1, 4):
        parameter.grad = gradient * t
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient * t
        v = 0.9 * v + 0.1 * (gradient * t) ** 2
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
