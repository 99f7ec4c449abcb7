"""Sharing against the same model unrolled, whose blocks are copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.generation import KVCache
from titan_lite.models.attention import Attention
from titan_lite.models.ffn import FFN
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.spec import collect_specs
from titan_lite.models.stack.shared import shared_plan
from titan_lite.models.transformer import Transformer

RTOL = 1e-6
"""fp32: gradients of a shared matrix against the sum of its copies'."""
ATOL = 1e-5
"""fp32, six layers: decoded with a cache against a full forward."""
NGPT: dict[str, Any] = {
    "residual": "ngpt",
    "norm": "none",
    "linear": "unit",
    "embedding": "unit",
    "attention": {"n_heads": 4, "qk_norm": "l2_scaled", "scale": "sqrt"},
    "ffn": {"type": "glu_scaled", "hidden": 48},
    "head": {"logit_scale": "learned"},
}


@pytest.mark.parametrize(
    ("share", "n_layers", "n_unique", "plan"),
    [
        ("cycle_rev", 12, 4, "0 1 2 3 0 1 2 3 3 2 1 0"),
        ("cycle_rev", 6, 3, "0 1 2 2 1 0"),
        ("cycle_rev", 5, 3, "0 1 2 2 1"),
        ("cycle", 6, 3, "0 1 2 0 1 2"),
        ("cycle", 7, 3, "0 1 2 0 1 2 0"),
        ("sequence", 6, 3, "0 0 1 1 2 2"),
        ("sequence", 7, 3, "0 0 0 1 1 2 2"),
        ("sequence", 5, 4, "0 0 1 2 3"),
        ("sequence", 4, 4, "0 1 2 3"),
        ("all", 4, 1, "0 0 0 0"),
    ],
)
def test_plans(share: str, n_layers: int, n_unique: int, plan: str):
    assert " ".join(map(str, shared_plan(share, n_layers, n_unique))) == plan


def test_the_paper_s_rule_for_sequences():
    """Layer i, from 1, of N uses block floor((i - 1) / (N / M)) + 1, where M divides N."""
    for n_unique in (1, 2, 3, 4, 6, 12):
        expected = tuple((i - 1) // (12 // n_unique) for i in range(1, 13))
        assert shared_plan("sequence", 12, n_unique) == expected


def name_in_shared(name: str, plan: tuple[int, ...], shared: Transformer) -> str:
    """The parameter of the sharing model that stands for one of the unrolled model."""
    if not name.startswith("stack.blocks."):
        return name
    _, _, layer, rest = name.split(".", 3)
    branch, _, inner = rest.partition(".")
    there = {other for other, _ in shared.named_parameters()}
    candidates = (
        f"stack.shared.{branch}.{plan[int(layer)]}.{inner}",
        f"stack.shared.{branch}.{plan[int(layer)]}.whole.{inner}",
        name if hasattr(shared.stack, "shared") and shared.stack.shared else "",
        f"stack.blocks.{plan[int(layer)]}.{rest}",
    )
    return next(candidate for candidate in candidates if candidate in there)


def pair(stack: dict[str, Any], **model: Any) -> tuple[Transformer, Transformer, dict[str, str]]:
    """A sharing model, its unrolled twin, and the names of the latter's parameters in the former."""
    shared, unrolled = tiny_model(stack=stack, **model), tiny_model(**model)
    plan = tiny_config(stack=stack, **model).stack.plan(model["n_layers"])
    names = {name: name_in_shared(name, plan, shared) for name, _ in unrolled.named_parameters()}
    with torch.no_grad():
        for name, parameter in unrolled.named_parameters():
            parameter.copy_(shared.get_parameter(names[name]))
        for buffer in unrolled.buffers():
            buffer.zero_()
    return shared, unrolled, names


STACKS = [
    {"type": "shared", "share": "cycle_rev", "n_unique": 3},
    {"type": "shared", "share": "sequence", "n_unique": 4, "scope": "attention"},
    {"type": "scheduled", "schedule": [0, 1, 2, 0, 2, 2], "scope": "ffn"},
    {"type": "shared", "share": "all", "scope": "branches"},
]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.get("scope", "block"))
@pytest.mark.parametrize("model", [{}, {"block": "parallel_shared_norm"}, NGPT], ids=["pre", "parallel", "ngpt"])
def test_equals_the_unrolled_model(stack: dict[str, Any], model: dict[str, Any]):
    shared, unrolled, names = pair(stack, n_layers=6, **model)
    assert {names[name] for name in names} == {name for name, _ in shared.named_parameters()}
    tokens = torch.randint(VOCAB, (2, 9))
    assert torch.equal(shared(tokens), unrolled(tokens))
    for each in (shared, unrolled):
        each(tokens).sin().sum().backward()
    sums = {name: torch.zeros_like(parameter) for name, parameter in shared.named_parameters()}
    for name, parameter in reversed(list(unrolled.named_parameters())):
        sums[names[name]] += parameter.grad
    for name, parameter in shared.named_parameters():
        scale = sums[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, sums[name], rtol=RTOL, atol=RTOL * scale, msg=name)


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.get("scope", "block"))
def test_a_cache_has_a_layer_for_each_execution(stack: dict[str, Any]):
    model = tiny_model(stack=stack, n_layers=6)
    tokens = torch.randint(VOCAB, (2, 9))
    cache = KVCache(9)
    pieces = []
    for piece in tokens.split([4, 1, 1, 3], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    assert sorted(cache.layers) == list(range(6))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=ATOL, rtol=0)


EXPERTS: list[dict[str, Any]] = [
    {"type": "mlp", "hidden": 24, "bias": True},
    {"type": "moe", "n_experts": 4, "experts": {"hidden": 8}, "shared_hidden": 8, "offset": "load"},
    {"type": "peer", "n_keys": 4, "n_heads": 2, "top_k": 2, "query_dim": 8},
]


@pytest.mark.parametrize("ffn", EXPERTS, ids=lambda ffn: ffn["type"])
def test_any_branch_can_be_shared(ffn: dict[str, Any]):
    attention = {
        "type": "gqa_fused",
        "n_heads": 4,
        "qk_norm": "rms",
        "gate": "element",
        "sink": "logit",
        "kernel": "eager",
    }
    stack = {"type": "shared", "n_unique": 2, "scope": "branches"}
    shared, unrolled, _ = pair(stack, n_layers=4, ffn=ffn, attention=attention)
    assert sum(name.endswith("sink.logit") for name, _ in shared.named_parameters()) == 4
    tokens = torch.randint(VOCAB, (2, 9))
    assert torch.equal(shared(tokens), unrolled(tokens))
    shared(tokens).sum().backward()
    assert collect_specs(shared).keys() >= {name for name, _ in shared.named_parameters()}


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts():
    plain = tiny_model(n_layers=6)
    block = plain.stack.blocks["0"]
    attention, ffn = (size(part) for kind in (Attention, FFN) for part in block.children() if isinstance(part, kind))
    outside = size(plain) - 6 * size(block)
    expected = {
        "block": outside + 2 * size(block),
        "attention": size(plain) - 4 * attention,
        "ffn": size(plain) - 4 * ffn,
        "branches": size(plain) - 4 * (attention + ffn),
    }
    for scope, count in expected.items():
        assert size(tiny_model(n_layers=6, stack={"type": "shared", "n_unique": 2, "scope": scope})) == count


def test_flops_do_not_depend_on_sharing():
    plain = tiny_model(n_layers=6)
    expected = training_flops_per_token(plain, collect_specs(plain), 64)
    for stack in STACKS:
        model = tiny_model(n_layers=6, stack=stack)
        assert training_flops_per_token(model, collect_specs(model), 64) == expected


def test_depth_counts_executions():
    """Matrices that write into the stream start smaller by sqrt(2 * 6), as in the unrolled model."""
    for stack in ("plain", {"type": "shared", "n_unique": 2}, {"type": "shared", "scope": "attention"}):
        model = tiny_model(n_layers=6, dim=64, stack=stack)
        names = [name for name, _ in model.named_parameters() if name.endswith("o.weight")]
        down = model.get_parameter(names[0])
        assert down.std().item() == pytest.approx(0.02 * 0.9866 / 12**0.5, rel=0.05)


def test_albert_style_ngpt():
    """One set of attention matrices; s_qk, alphas, s_u and s_v belong to layers."""
    stack = {"type": "shared", "share": "all", "scope": "attention"}
    model = tiny_model(stack=stack, n_layers=4, **NGPT)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if ".shared." in name] == [f"stack.shared.attention.0.{m}.weight" for m in "qkvo"]
    for each in ("attention.qk_norm.s_qk", "attention_residual.alpha", "ffn_residual.alpha", "ffn.s_u", "ffn.s_v"):
        assert sum(f"{each}.value" in name for name in names) == 4
    first, last = (model.stack.blocks[number].attention for number in ("0", "3"))
    tokens = torch.randn(1, 3, 32)
    before = first.q(tokens)
    with torch.no_grad():
        model.stack.shared["attention"]["0"].q.weight.mul_(2)
    assert torch.equal(first.q(tokens), 2 * before)
    assert torch.equal(last.q(tokens), first.q(tokens))


def refusal(model: dict[str, Any], **sections: Any) -> dict[str, str]:
    tables = {"dim": 32, "n_layers": 4, "attention": {"n_heads": 4}, "ffn": {"hidden": 48}} | model
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": tables, "activation_checkpoint": {"mode": "none"}} | sections)
    assert {problem.code for problem in caught.value.problems} == {CROSS_FIELD}
    return {problem.key: problem.why for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("model", "key", "other"),
    [
        ({"stack": {"type": "shared", "n_unique": 5}}, "model.stack.n_unique", "model.n_layers"),
        ({"stack": {"type": "shared", "share": "all", "n_unique": 2}}, "model.stack.n_unique", "share"),
        ({"stack": {"type": "scheduled", "schedule": [0, 1]}}, "model.stack.schedule", "model.n_layers"),
        ({"stack": {"type": "scheduled", "schedule": [0, 2, 2, 0]}}, "model.stack.schedule", "never uses 1"),
        ({"stack": "shared", "residual": "admin"}, "model.residual.type", 'model.stack.scope = "block"'),
        (
            {"stack": "shared", "layers": [{"at": -1, "attention": {"position": "none"}}]},
            "model.layers[0].attention.position",
            "model.stack.scope",
        ),
    ],
)
def test_refusals(model: dict[str, Any], key: str, other: str):
    assert other in refusal(model)[key]


def test_layers_may_differ_in_what_they_do_not_share():
    stack = {"type": "shared", "share": "all", "scope": "ffn"}
    model = {"dim": 32, "n_layers": 4, "attention": {"n_heads": 4}, "stack": stack}
    tables = {"model": model | {"layers": [{"at": -1, "attention": {"position": "none"}}]}}
    job_from_dict(tables | {"activation_checkpoint": {"mode": "none"}})
    tables["model"]["layers"] = [{"at": -1, "ffn": {"activation": "relu"}}]
    with pytest.raises(ConfigError, match=r"model.layers\[0\].ffn"):
        job_from_dict(tables | {"activation_checkpoint": {"mode": "none"}})


def test_every_nth_layer_must_meet_the_same_blocks():
    every_second = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
    cycle = {"stack": {"type": "shared", "n_unique": 3}, "n_layers": 6}
    assert "model.stack.type" in refusal(cycle, **every_second)["activation_checkpoint.selective_ac_option"]
    for unlike in ({"n_unique": 2}, {"n_unique": 3, "scope": "branches"}):
        model = {"n_layers": 6, "attention": {"n_heads": 4}, "stack": {"type": "shared"} | unlike}
        job_from_dict({"model": model} | every_second)
