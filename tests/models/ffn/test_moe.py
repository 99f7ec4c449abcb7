"""Mixtures of experts against a dense mixture in float64, token by token from the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.ffn.moe_cases import D, context, inputs, make
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.ffn.moe import MoE
from titan_lite.models.ffn.moe.experts import grouped_linear

ATOL = 1e-5
"""fp32, one module, outputs of a few units."""
MARGIN = 1e-4
"""Smallest distance, between the last score chosen and the first one not, at which float32 cannot choose otherwise."""
GROUPS = {"n_groups": 4, "top_groups": 2}

CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "one expert each": {"top_k": 1, "router": {"normalize": False}},
    "weights as they are": {"top_k": 3, "router": {"normalize": False, "scale": 1.5}},
    "all experts": {"top_k": 8},
    "sigmoid": {"top_k": 3, "router": "sigmoid"},
    "sigmoid as it is": {"router": {"type": "sigmoid", "normalize": False, "scale": 2.5}},
    "groups": {"top_k": 3, "router": {"type": "sigmoid", **GROUPS}, "offset": "load"},
    "softmax groups": {"top_k": 4, "router": {**GROUPS}},
    "deepseek": {
        "n_experts": 16,
        "top_k": 4,
        "router": {"type": "sigmoid", "scale": 2.5, **GROUPS},
        "offset": "load",
        "shared_hidden": 20,
    },
    "gpt-oss": {
        "experts": {"type": "clamped_swiglu", "hidden": 16, "bias": True, "limit": 1.0},
        "router": {"bias": True},
    },
    "biases": {"experts": {"hidden": 16, "bias": True, "activation": "gelu"}, "shared_hidden": 12},
}


def moe(**table: Any) -> MoE:
    made: MoE = make("moe", **({"experts": {"hidden": 16}} | table))
    if made.offset() is not None:
        made.offset.value.copy_(torch.linspace(-0.2, 0.2, len(made.offset.value)).flip(0))
    return made


def dense(layer: MoE, table: dict[str, Any], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's function of x (B, T, D) in float64: every expert on every token, weights 0 where not chosen."""
    p = {name: t.detach().double().requires_grad_() for name, t in layer.named_parameters()}
    router = table.get("router", {})
    router = {"type": router} if isinstance(router, str) else {"type": "softmax", **router}
    experts = table.get("experts", {})
    rows = []
    for token in x.flatten(0, 1):
        logits = p["router.weight"] @ token + p.get("router.bias", torch.zeros((), dtype=torch.float64))
        scores = logits.exp() / logits.exp().sum() if router["type"] == "softmax" else 1 / (1 + torch.exp(-logits))
        chosen = choose(scores.detach(), layer.offset(), layer.router.top_k, router)
        total = sum(scores[e] for e in chosen) if router.get("normalize", True) else 1.0
        y = torch.zeros(D, dtype=torch.float64)
        for e in chosen:
            y = y + router.get("scale", 1.0) * scores[e] / total * expert(p, e, token, experts)
        if "shared.ffn.gate.weight" in p:
            gate, up = p["shared.ffn.gate.weight"] @ token, p["shared.ffn.up.weight"] @ token
            y = y + p["shared.ffn.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        rows.append(y)
    return torch.stack(rows).view_as(x), p


def choose(scores: Tensor, offset: Tensor | None, k: int, router: dict[str, Any]) -> list[int]:
    """Experts by sorting; asserts that no distance between chosen and not is within rounding."""
    ranked = scores if offset is None else scores + offset.double()
    allowed = list(range(len(ranked)))
    if n := router.get("n_groups"):
        size = len(ranked) // n
        best = {g: sum(sorted(ranked[g * size : (g + 1) * size].tolist())[-2:]) for g in range(n)}
        order = sorted(best, key=best.__getitem__, reverse=True)
        top = router["top_groups"]
        assert best[order[top - 1]] - best[order[top]] > MARGIN
        allowed = [g * size + i for g in order[:top] for i in range(size)]
    allowed.sort(key=lambda e: -ranked[e].item())
    assert len(allowed) == k or ranked[allowed[k - 1]] - ranked[allowed[k]] > MARGIN
    return allowed[:k]


def expert(p: dict[str, Tensor], e: int, x: Tensor, table: dict[str, Any]) -> Tensor:
    def affine(v: Tensor, name: str) -> Tensor:
        y = v @ p[f"experts.{name}"][e]
        return y + p[f"experts.{name}_bias"][e] if f"experts.{name}_bias" in p else y

    gate, up = affine(x, "gate"), affine(x, "up")
    if table.get("type") == "clamped_swiglu":
        gate, up = gate.clamp(max=table["limit"]), up.clamp(-table["limit"], table["limit"])
        inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    elif table.get("activation") == "gelu":
        inner = gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up
    else:
        inner = gate / (1 + torch.exp(-gate)) * up
    return affine(inner, "down")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_a_dense_mixture(case: str):
    """Gradients of the router come through the weights of the chosen experts."""
    layer, x = moe(**CASES[case]), inputs()
    mine, other = x.clone().requires_grad_(), x.double().requires_grad_()
    y = layer(mine, context())
    expected, p = dense(layer, CASES[case], other)
    assert y.std() > 0.1
    torch.testing.assert_close(y, expected.float(), atol=ATOL, rtol=ATOL)
    for result in (y, expected):
        (result * torch.arange(D) / D).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad.float(), atol=10 * ATOL, rtol=ATOL)
    for name, parameter in layer.named_parameters():
        gradient = p[name].grad.float()
        assert gradient.abs().max() > 0 or layer.router.top_k == layer.router.n_experts, name
        torch.testing.assert_close(parameter.grad, gradient, atol=10 * ATOL, rtol=ATOL, msg=name)


def test_normalised_weights_are_a_softmax_over_the_chosen_logits():
    layer, tokens = moe(top_k=3), inputs().flatten(0, 1)
    routing = layer.router(tokens, None)
    logits, experts = (tokens @ layer.router.weight.t()).topk(3)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, logits.softmax(-1), atol=1e-6, rtol=0)


def test_routing_is_done_in_float32():
    layer, tokens = moe(router="sigmoid").bfloat16(), inputs(8, 64).flatten(0, 1).bfloat16()
    routing = layer.router(tokens, None)
    assert {part.dtype for part in (routing.weights, routing.scores, routing.logits)} == {torch.float32}
    exact = (tokens.double() @ layer.router.weight.double().t()).topk(2).indices
    assert (routing.experts == exact).float().mean() > 0.999
    rounded = (tokens @ layer.router.weight.t()).topk(2).indices
    assert (rounded == exact).float().mean() < 0.999


@pytest.mark.parametrize("experts", [{"hidden": 16}, {"hidden": 16, "bias": True}])
def test_bfloat16(experts: dict[str, Any]):
    layer, x = moe(experts=experts).bfloat16(), inputs().bfloat16()
    reference = moe(experts=experts)
    reference.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    y = layer(x, context())
    assert y.dtype == torch.bfloat16
    exact = reference(x.float(), context())
    torch.testing.assert_close(y.float(), exact, atol=0.03 * exact.abs().max().item(), rtol=0)
    y.float().square().sum().backward()
    exact.square().sum().backward()
    for name, parameter in layer.named_parameters():
        gradient = reference.get_parameter(name).grad
        assert (parameter.grad.float() - gradient).norm() < 0.05 * gradient.norm(), name


def test_experts_without_tokens():
    """All tokens choose experts 1 and 2 of 8: the others' gradients are exactly 0, and nothing else is disturbed."""
    layer = moe(router={"bias": True})
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([0.0, 40.0, 40.0, 0, 0, 0, 0, 0]))
    x = inputs()
    y = layer(x, context())
    expected, _ = dense(layer, {"router": {"bias": True}}, x.double())
    torch.testing.assert_close(y, expected.float(), atol=ATOL, rtol=ATOL)
    y.square().sum().backward()
    for name in ("gate", "up", "down"):
        gradient = layer.experts.get_parameter(name).grad
        used = gradient.flatten(1).abs().amax(1) > 0
        assert used.tolist() == [False, True, True, False, False, False, False, False]
        assert gradient.isfinite().all()


def test_grouped_products_take_any_gradient():
    x, weight = torch.randn(10, 8), torch.randn(4, 8, 16)
    ends = torch.tensor([3, 3, 10, 10], dtype=torch.int32)
    expected = torch.cat((x[:3] @ weight[0], x[3:] @ weight[2]))
    for gradient in (torch.ones(()).expand(10, 16), torch.randn(16, 10).t(), torch.randn(10, 32)[:, ::2]):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped_linear(a, b, None, ends)
        torch.testing.assert_close(y, expected, atol=ATOL, rtol=ATOL)
        y.backward(gradient)
        torch.testing.assert_close(b.grad[2], x[3:].t() @ gradient[3:], atol=ATOL, rtol=ATOL)
        torch.testing.assert_close(a.grad[:3], gradient[:3] @ weight[0].t(), atol=ATOL, rtol=ATOL)
        assert not b.grad[1].any()


def test_the_grouped_product_is_a_sound_operator():
    """Its shape function, its gradient and how it is traced, checked by torch."""
    args = (torch.randn(10, 8, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True))
    torch.library.opcheck(torch.ops.titan_lite.grouped_mm.default, (*args, torch.tensor([4, 4, 10], dtype=torch.int32)))


def test_a_token_changes_no_other():
    layer, x = moe(**CASES["deepseek"]), inputs()
    changed = x.clone()
    changed[1, 3] += 1
    before, after = layer(x, context()), layer(changed, context())
    same = torch.ones(3, 7, dtype=torch.bool)
    same[1, 3] = False
    torch.testing.assert_close(after[same], before[same], atol=1e-6, rtol=0)
    assert (after[~same] - before[~same]).abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ["groups", "gpt-oss"])
def test_one_graph_and_the_same_numbers(case: str, training: bool):
    """Nothing is read back from the device: that would break the graph."""
    table = CASES[case] | {"balance": ["sequence", "micro_batch", "z_loss"]}
    eager, compiled = moe(**table), moe(**table)
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    results = []
    for layer in (eager, compiled):
        x = inputs().requires_grad_()
        y = layer(x, context(0.01 if training else None))
        y.sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters()), layer.tally.count])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "top_k": ({"top_k": 9}, ".top_k", "n_experts = 8"),
    "groups": ({"router": {"n_groups": 3}}, ".router.n_groups", "n_experts = 8"),
    "groups of one": ({"router": {"n_groups": 8}}, ".router.n_groups", "n_experts = 8"),
    "more groups than there are": (
        {"router": {"n_groups": 4, "top_groups": 5}},
        ".router.top_groups",
        "router.n_groups = 4",
    ),
    "groups that do nothing": ({"router": {"top_groups": 2}}, ".router.top_groups", "router.n_groups = 1"),
    "too few groups": ({"top_k": 3, "router": {"n_groups": 4}}, ".router.top_groups", "top_k = 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str):
    table, key, other = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"ffn": {"type": "moe"} | table}})
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == (CROSS_FIELD, f"model.ffn{key}")
    assert other in problem.why
    assert problem.allowed


def test_sizes_that_the_grouped_product_does_not_take():
    with pytest.raises(ConfigError, match=r"experts.hidden = 20\n.*multiple of 8"):
        job_from_dict({"model": {"ffn": {"type": "moe", "experts": {"hidden": 20}}}})
    with pytest.raises(ConfigError, match=r"model.dim = 36"):
        job_from_dict({"model": {"dim": 36, "ffn": {"type": "moe"}, "attention": {"n_heads": 6}}})


def test_sizes_of_zero():
    for table in ({"n_experts": 0}, {"top_k": 0}, {"experts": {"hidden": 0}}, {"router": {"n_groups": 0}}):
        with pytest.raises(ConfigError):
            job_from_dict({"model": {"ffn": {"type": "moe"} | table}})


def test_weights_are_soft_where_all_experts_serve():
    """k = E: the softmax mixture of all experts."""
    layer, x = moe(top_k=8), inputs()
    every = []
    for e in range(8):
        gate, up, down = (layer.experts.get_parameter(name)[e] for name in ("gate", "up", "down"))
        every.append((F.silu(x @ gate) * (x @ up)) @ down)
    weights = (x @ layer.router.weight.t()).softmax(-1)
    expected = torch.einsum("bte,ebtd->btd", weights, torch.stack(every))
    torch.testing.assert_close(layer(x, context()), expected, atol=ATOL, rtol=ATOL)
