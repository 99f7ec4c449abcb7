"""What balances experts: losses in closed form and over micro-batches, offsets from loads, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.ffn.moe_cases import context, inputs, make
from titan_lite.config.load import job_from_dict
from titan_lite.models.aux_loss import add_loss
from titan_lite.models.ffn.moe import Balance, MoE, Routing
from titan_lite.models.ffn.moe.tally import counts
from titan_lite.models.row import WHOLE

ATOL = 1e-6
"""fp32, losses of about one unit."""
E, K, ROWS, T = 4, 2, 3, 5


def routing(seed: int = 0) -> Routing:
    logits = torch.randn(ROWS * T, E, generator=torch.Generator().manual_seed(seed))
    scores = logits.softmax(-1)
    weights, experts = scores.topk(K)
    return Routing(experts, weights, scores, logits)


def loss_of(name: str, of: Routing, n_rows: int = ROWS, coefficient: float = 1.0) -> Tensor:
    balance = Balance.Config.choose({"type": name, "coefficient": coefficient}).build()
    return balance.loss(of, n_rows, WHOLE)


def test_sequence_loss_in_closed_form():
    """The loss of arXiv 2412.19437 (17-20) of each row, times its tokens."""
    found, total = routing(), 0.0
    for row in range(ROWS):
        tokens = range(row * T, (row + 1) * T)
        for e in range(E):
            f = E / (K * T) * sum(e in found.experts[t].tolist() for t in tokens)
            p = sum(found.scores[t, e].item() for t in tokens) / T
            total += T * f * p
    torch.testing.assert_close(loss_of("sequence", found, coefficient=0.5).item(), 0.5 * total, atol=1e-4, rtol=0)


def test_micro_batch_loss_in_closed_form():
    """Switch's E * sum f_i P_i over all tokens, times how many there are."""
    found, N = routing(), ROWS * T
    f = torch.tensor([(found.experts == e).sum() / (N * K) for e in range(E)])
    expected = N * E * (f * found.scores.mean(0)).sum()
    torch.testing.assert_close(loss_of("micro_batch", found), expected, atol=1e-4, rtol=0)
    assert not torch.isclose(loss_of("sequence", found), expected)
    torch.testing.assert_close(loss_of("sequence", found, n_rows=1), expected, atol=1e-4, rtol=0)


def test_router_z_loss_in_closed_form():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    found = Routing(torch.zeros(2, 1).long(), torch.ones(2, 1), logits.softmax(-1), logits)
    loss = loss_of("z_loss", found, n_rows=1)
    lse = torch.tensor([4.0, 4.0]).log() + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(loss, lse.square().sum(), atol=ATOL, rtol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, (2 * lse / 4)[:, None].expand(2, 4), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["sequence", "micro_batch"])
def test_balanced_tokens_cost_one_coefficient_each(name: str):
    uniform = torch.full((ROWS * 4, E), 1 / E)
    experts = torch.stack((torch.arange(ROWS * 4) % E, (torch.arange(ROWS * 4) + 1) % E), 1)
    found = Routing(experts, uniform[:, :K], uniform, uniform.log())
    assert loss_of(name, found).item() == pytest.approx(ROWS * 4)


def gradients(layer: MoE, x: Tensor, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Of the auxiliary losses alone: the branch's own output does not matter."""
    layer.zero_grad()
    for part in x.split(sizes):
        layer(part, context(1 / 42)).mul(0.0).sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sequence", "z_loss", "micro_batch"])
def test_which_losses_add_up_over_micro_batches(name: str):
    layer = make("moe", experts={"hidden": 16}, balance=[{"type": name, "coefficient": 0.5}])
    x = inputs(6)
    whole = gradients(layer, x, (6,))["router.weight"]
    assert whole.abs().max() > 1e-4
    for sizes in ((2, 4), (1, 1, 1, 1, 1, 1)):
        parts = gradients(layer, x, sizes)["router.weight"]
        if name == "micro_batch":
            assert (parts - whole).abs().max() > 1e-3 * whole.abs().max()
        else:
            torch.testing.assert_close(parts, whole, atol=ATOL, rtol=1e-4)
    assert set(gradients(layer, x, (6,))) >= {"router.weight"}


def test_losses_act_in_training_only_and_change_no_output():
    table: dict[str, Any] = {"experts": {"hidden": 16}}
    plain, balanced = make("moe", **table), make("moe", **table, balance=["sequence", "z_loss"])
    x = inputs()
    assert torch.equal(plain(x, context()), balanced(x, context(0.1)))
    for weight in (None, 0.1):
        grads = []
        for layer in (plain, balanced):
            layer.zero_grad()
            layer(x, context(weight)).sum().backward()
            grads.append(layer.router.weight.grad)
        assert torch.equal(*grads) == (weight is None)


def test_an_added_loss_is_minimised_beside_the_objective():
    w = torch.tensor(2.0, requires_grad=True)
    x = torch.randn(3, requires_grad=True)
    y = add_loss(x, w.square())
    assert torch.equal(y, x)
    (y.sum() * 7).backward()
    assert w.grad == 4.0  # not 28: the objective's own factor is none of its business
    assert torch.equal(x.grad, torch.full((3,), 7.0))


def test_counts():
    experts = torch.randint(E, (3, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counts(experts, E), torch.stack([row.bincount(minlength=E) for row in experts]).float())


def test_offsets_follow_the_sign_of_the_load():
    layer = make("moe", n_experts=4, top_k=1, experts={"hidden": 16}, offset={"type": "load", "rate": 0.25})
    for experts in ([0, 0, 0, 0], [1, 1, 2, 2]):
        layer.tally.add(torch.tensor(experts))
    layer.after_step(lambda load: load * 2)  # two ranks
    assert layer.offset.value.tolist() == [-0.25, 0.0, 0.0, 0.25]
    assert layer.metrics(lambda load: load)["max_load"] == 2.0
    assert not layer.tally.count.any()
    layer.after_step(lambda load: load)  # nothing was counted
    assert layer.offset.value.tolist() == [-0.25, 0.0, 0.0, 0.25]


def test_offsets_choose_and_do_not_weigh():
    layer = make("moe", experts={"hidden": 16}, router="sigmoid", offset="load")
    tokens = inputs().flatten(0, 1)
    offset = torch.zeros(8)
    offset[5] = 10.0
    found = layer.router(tokens, offset)
    assert (found.experts[:, 0] == 5).all()
    scores = torch.sigmoid(tokens @ layer.router.weight.t())
    chosen = scores.gather(1, found.experts)
    torch.testing.assert_close(found.weights, chosen / chosen.sum(1, keepdim=True), atol=ATOL, rtol=0)


def test_offsets_balance_a_skewed_router():
    """A router that prefers two experts, and no training but that of the offsets."""
    layer = make(
        "moe", experts={"hidden": 16}, router={"type": "sigmoid", "bias": True}, offset={"type": "load", "rate": 0.02}
    )
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([3.0, 2.0, 0, 0, 0, 0, 0, 0]))
    loads = []
    for step in range(60):
        layer(inputs(8, 32, seed=step), context(1.0))
        layer.after_step(lambda load: load)
        loads.append(layer.metrics(lambda load: load)["max_load"].item())
    assert loads[0] > 2.5
    assert max(loads[-5:]) < 1.4


def test_layout_dependent_losses_say_so():
    tables: dict[str, Any] = {"model": {"ffn": {"type": "moe", "balance": ["micro_batch"]}}}
    (line,) = [line for line in job_from_dict(tables).warnings if "micro_batch" in line]
    assert "model.ffn.balance" in line
    assert "training.local_batch_size" in line
    tables["model"]["ffn"]["balance"] = ["sequence", "z_loss"]
    assert not any("balance" in line for line in job_from_dict(tables).warnings)
