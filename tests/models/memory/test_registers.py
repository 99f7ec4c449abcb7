"""Registers against their definition: what they add to the softmax, who sees them, how they start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.attention.alone import B, D, T, attention, context_for, inputs, run
from tests.models.attention.cases import DH, DV, MASKS, Case, G, H, Slope
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.generation import KVCache
from titan_lite.models.attention import GroupedAttention
from titan_lite.models.attention.kernel import Kernel
from titan_lite.models.position import Position
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
"""fp32, one attention."""
MODEL_ATOL = 1e-4
"""fp32, whole models."""
N = 3
KERNELS = ["sdpa", "eager", pytest.param("flex", marks=pytest.mark.filterwarnings("ignore:flex_attention called"))]


def with_registers(**table: Any) -> dict[str, Any]:
    return {"n_heads": 4, "n_kv_heads": 2, "registers": {"type": "learned", "n": N}, **table}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("bias", [False, True])
def test_they_are_keys_that_all_see_without_a_bias(kernel: str, masks: str, bias: bool) -> None:
    """Every kernel against float64: the mass of the registers and of the keys that masks allow is 1 in all."""
    case = Case(masks=MASKS[masks], **({"bias": Slope()} if bias else {}))
    generator = torch.Generator().manual_seed(7)
    keys = torch.randn(B, G, N, DH, generator=generator)
    values = torch.randn(B, G, N, DV, generator=generator)
    with torch.compiler.set_stance("force_eager"):
        attend: Kernel = Kernel.Config.choose(kernel).build(
            scoring=case.scoring.__class__(**{**vars(case.scoring), "registers": N})
        )
        k, v = torch.cat((keys, case.k), dim=2), torch.cat((values, case.v), dim=2)
        ours = attend(case.q, k, v, case.context(attend))
    beside = torch.einsum("bhid,bhjd->bhij", case.q.double(), keys.double().repeat_interleave(H // G, 1)) * case.scale
    weights = torch.cat((beside, case.scores()), dim=-1).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    expected = weights @ v.double().repeat_interleave(H // G, 1)
    torch.testing.assert_close(ours.double(), expected, atol=ATOL, rtol=0)
    if kernel == "eager":
        _, lse = attend.with_lse(case.q, k, v, case.context(attend))
        whole = torch.cat((beside, case.scores()), dim=-1).logsumexp(-1)
        torch.testing.assert_close(lse.double(), whole, atol=ATOL, rtol=0)


def set_registers(module: GroupedAttention, k: Tensor | float, v: Tensor | float) -> None:
    with torch.no_grad():
        for parameter, value in ((module.registers.k, k), (module.registers.v, v)):
            parameter.copy_(torch.as_tensor(value).expand_as(parameter))


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_registers_that_score_nothing_change_nothing(kernel: str) -> None:
    """Keys opposite to all queries, far out: the plain attention's outputs."""
    module = attention(**with_registers(kernel=kernel, position="none", bias=["q"]))
    plain = attention(n_heads=4, n_kv_heads=2, kernel=kernel, position="none", bias=["q"])
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("registers")})
    with torch.no_grad():
        for each in (module, plain):
            each.q.bias.fill_(5.0)  # so that every query is on one side
    set_registers(module, -1e3, 1e3)
    x = inputs()
    torch.testing.assert_close(run(module, x), run(plain, x), atol=ATOL, rtol=0)


def test_a_register_without_a_value_is_a_sink() -> None:
    """With a logit s that is the same for all queries, as gpt-oss has it: outputs * sigmoid(LSE - s)."""
    module = attention(n_heads=4, n_kv_heads=2, kernel="eager", registers={"type": "learned", "n": 1}, position="none")
    sink = attention(n_heads=4, n_kv_heads=2, kernel="eager", sink="logit", position="none")
    shared = {k: v for k, v in module.state_dict().items() if not k.startswith("registers")}
    with torch.no_grad():
        for name in ("q", "k"):  # the first number of every head: 1 in all queries, 0 in all keys
            weight = shared[f"{name}.weight"].view(-1, 8, D)
            weight[:, 0] = 0
    logits = torch.tensor([0.7, -1.2])
    sink.load_state_dict(shared | {"sink.logit": logits.repeat_interleave(2)})
    module.load_state_dict(shared, strict=False)
    set_registers(module, 0.0, 0.0)
    with torch.no_grad():
        module.registers.k[:, 0, 0] = logits * math.sqrt(8)
    project = GroupedAttention.project

    def with_one(self: GroupedAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = type(module).project(self, x)
        q[..., 0] = 1.0
        return q, k, v

    for each in (module, sink):
        each.project = with_one.__get__(each)
    assert project is GroupedAttention.project
    x = inputs()
    torch.testing.assert_close(run(module, x), run(sink, x), atol=ATOL, rtol=0)


@pytest.mark.parametrize("masks", ["causal", "window"])
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_a_cache_holds_no_registers(masks: str, position: str) -> None:
    model = tiny_model(attention=with_registers(masks=MASKS[masks], position=position))
    tokens = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    cache = KVCache(17)
    pieces = []
    for piece in tokens.split([5, 1, 3, 1, 7], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=MODEL_ATOL, rtol=0)
    assert cache.layer(0).k.shape[2] == 17


@pytest.mark.parametrize(
    ("scaling", "size"),
    [
        ("none", 1.0),
        ({"type": "yarn", "factor": 4.0, "original_max_len": 8}, 0.1 * math.log(4) + 1),
        ({"type": "lswt", "train_len": 4}, 0.07 * math.log(12 / 4) + 1),
        ({"type": "lswt", "ntk_scale": 2.0}, 1.0),
    ],
)
def test_they_grow_with_keys_and_are_not_turned(scaling: Any, size: float) -> None:
    for fraction in (1.0, 0.5):
        table = {"type": "rope", "scaling": scaling, "fraction": fraction}
        module: Position = Position.Config.choose(table).build(n_heads=4, head_dim=8)
        k = torch.randn(2, N, 8)
        expected = k.clone()
        expected[..., : int(8 * fraction)] *= size
        torch.testing.assert_close(module.resting(k, 12), expected)


def test_the_factor_of_the_scores_reaches_them() -> None:
    """In a model of its own: scores of registers, measured by a value that only they have."""
    yarn = {"type": "rope", "scaling": {"type": "yarn", "factor": 4.0, "original_max_len": 8, "attention_factor": 2.0}}
    scaled, plain = (attention(**with_registers(kernel="eager", position=position)) for position in (yarn, "none"))
    plain.load_state_dict({k: v for k, v in scaled.state_dict().items() if k in plain.state_dict()})
    with torch.no_grad():
        scaled.k.weight.zero_()  # all keys are 0, so that only scores of registers depend on queries
        plain.k.weight.zero_()
        plain.registers.k.mul_(
            2 * 2
        )  # registers and queries twice as long; queries are turned at position 0 by nothing
    x = inputs()[:, :1]
    torch.testing.assert_close(run(scaled, x), run(plain, x), atol=ATOL, rtol=0)


def test_norms_leave_them_alone() -> None:
    module = attention(**with_registers(qk_norm="rms", position="none"))
    seen: list[Tensor] = []
    module.kernel.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    run(module, inputs())
    assert torch.equal(seen[0][:, :, :N], module.registers.k.expand(B, -1, -1, -1))
    assert seen[0].shape[2] == N + T


def test_they_start_alike_whatever_the_init_and_nothing_else_moves() -> None:
    """N(0, 1 / Dh), not the init slot's distribution; every other parameter is what it is without them."""
    table = with_registers(registers={"type": "learned", "n": 500}, value_dim=4)
    for init in ("truncated_normal", {"type": "normal", "std": 3.0}, {"type": "orthogonal"}):
        model, without = (
            tiny_model(attention=table, init=init),
            tiny_model(attention={k: v for k, v in table.items() if k != "registers"}, init=init),
        )
        parameters = dict(model.named_parameters())
        for name, parameter in without.named_parameters():
            assert torch.equal(parameters.pop(name), parameter), name
        assert sorted(parameters) == [f"stack.blocks.{i}.attention.registers.{n}" for i in (0, 1) for n in "kv"]
        for parameter in parameters.values():
            assert parameter.std().item() == pytest.approx(8**-0.5, rel=0.06)
            assert abs(parameter.mean().item()) < 0.03
            assert parameter.abs().max() > 3 * 8**-0.5  # no truncation
    specs = collect_specs(model)
    assert {specs[name].role for name in parameters} == {"scalar"}


@pytest.mark.parametrize("masks", ["causal", "window and document"])
def test_no_token_sees_the_future(masks: str) -> None:
    model = tiny_model(attention=with_registers(masks=MASKS[masks]))
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(16) >= 6).int().expand(2, -1)
    changed = tokens.clone()
    changed[:, 9] += 1
    before, after = model(tokens, documents), model(changed % VOCAB, documents)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


def test_flops_count_them() -> None:
    module, plain = attention(**with_registers()), attention(n_heads=4, n_kv_heads=2)
    assert module.score_flops_per_token(16) == plain.score_flops_per_token(16 + N)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"masks": ["causal", "document"]}, "document"),
        ({"masks": ["causal", {"type": "sliding_window", "window": 5}]}, "sliding_window"),
        ({"position": "alibi"}, "alibi"),
    ],
)
def test_flash_attn_refuses_what_would_hide_them(table: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"attention": with_registers(kernel="flash_attn", **table)}})
    (problem,) = [p for p in caught.value.problems if p.key == "model.attention.registers.type"]
    assert word in problem.why
    assert "flash_attn" in problem.why


def test_x_transformers_num_mem_kv() -> None:
    """The same thing there: keys and values before those of the tokens."""
    from x_transformers import x_transformers

    theirs = x_transformers.Attention(dim=D, heads=4, dim_head=8, kv_heads=4, causal=True, num_mem_kv=N, flash=False)
    module = attention(**with_registers(n_kv_heads=4, position="none", kernel="eager"))
    with torch.no_grad():
        for ours, name in ((module.q, "to_q"), (module.k, "to_k"), (module.v, "to_v"), (module.o, "to_out")):
            getattr(theirs, name).weight.copy_(ours.weight)
        theirs.mem_k.copy_(module.registers.k)
        theirs.mem_v.copy_(module.registers.v)
    x = inputs()
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(module(x, context_for(module)), expected, atol=ATOL, rtol=0)
