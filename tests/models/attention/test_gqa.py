"""Grouped heads against ungrouped ones, against Hugging Face, and written out; what acts on the projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.attention.alone import D, T, attention, context_for, inputs, run
from titan_lite.models.attention import GroupedAttention

ATOL = 1e-5
ALL = ("q", "k", "v", "o")


def repeated(grouped: GroupedAttention, **table: Any) -> GroupedAttention:
    """An attention with a key and value head for each query head: those of `grouped`, repeated."""
    groups = grouped.n_heads // grouped.n_kv_heads
    alone = attention(**table)
    state = grouped.state_dict()
    for name in ("k", "v"):
        for part in ("weight", "bias"):
            if (key := f"{name}.{part}") in state:
                state[key] = (
                    state[key].unflatten(0, (grouped.n_kv_heads, -1)).repeat_interleave(groups, 0).flatten(0, 1)
                )
    alone.load_state_dict(state)
    return alone


def written_out(module: GroupedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v without positions, head by head in float64, then W_o."""
    heads = []
    for h in range(module.n_heads):
        g = h * module.n_kv_heads // module.n_heads
        scores = q[:, h].double() @ k[:, g].double().mT * module.head_dim**-0.5
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, g].double())
    out = torch.cat(heads, dim=-1) @ module.o.weight.double().t()
    return out if module.o.bias is None else out + module.o.bias.double()


@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("bias", [(), ALL])
def test_grouped_heads_are_repeated_heads(n_kv_heads: int, bias: tuple[str, ...]):
    table = {"n_heads": 4, "value_dim": 6, "bias": bias}
    grouped = attention(**table, n_kv_heads=n_kv_heads)
    alone = repeated(grouped, **table, n_kv_heads=4)
    x, upstream = inputs(), inputs(2)
    out = run(grouped, x)
    torch.testing.assert_close(out, run(alone, x), atol=ATOL, rtol=0)
    (out * upstream).sum().backward()
    (run(alone, x) * upstream).sum().backward()
    for name in ("k", "v"):
        of_heads = alone.get_submodule(name).weight.grad.unflatten(0, (n_kv_heads, 4 // n_kv_heads, -1))
        shared = grouped.get_submodule(name).weight.grad.unflatten(0, (n_kv_heads, -1))
        torch.testing.assert_close(shared, of_heads.sum(1), atol=ATOL, rtol=0)


def test_as_many_key_heads_as_query_heads_is_the_default():
    given, default = attention(n_heads=4, n_kv_heads=4), attention(n_heads=4)
    assert torch.equal(run(given, inputs()), run(default, inputs()))


@pytest.mark.parametrize("value_dim", [0, 3, 24])
def test_values_of_their_own_width(value_dim: int):
    module = attention(n_heads=4, n_kv_heads=2, head_dim=16, value_dim=value_dim, position="none", bias=ALL)
    x = inputs()
    width = value_dim or 16
    q, k, v = F.linear(x, module.q.weight), F.linear(x, module.k.weight), F.linear(x, module.v.weight)
    q, k, v = q + module.q.bias, k + module.k.bias, v + module.v.bias
    q, k, v = (y.unflatten(-1, (-1, w)).transpose(1, 2) for y, w in ((q, 16), (k, 16), (v, width)))
    assert module.o.weight.shape == (D, 4 * width)
    torch.testing.assert_close(run(module, x).double(), written_out(module, q, k, v), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_one_bias(name: str):
    module = attention(n_heads=4, n_kv_heads=2, bias=[name])
    assert [key for key in module.state_dict() if key.endswith("bias")] == [f"{name}.bias"]


def test_against_transformers_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True)
    config._attn_implementation = "sdpa"
    module, reference = attention(n_heads=4, n_kv_heads=2, head_dim=16, bias=ALL), LlamaAttention(config, 0)
    reference.load_state_dict({name.replace(".", "_proj."): value for name, value in module.state_dict().items()})
    x = inputs()
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    torch.testing.assert_close(run(module, x), reference(x, angles, None)[0], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["gqa", "gqa_fused"])
def test_activation_of_the_projections(kind: str):
    module = attention(type=kind, n_heads=4, n_kv_heads=2, position="none", activation="relu")
    x = inputs()
    q, k, v = (part.clamp(min=0) for part in module.project(x))
    assert (module.project(x)[2] < 0).any()
    torch.testing.assert_close(run(module, x).double(), written_out(module, q, k, v), atol=ATOL, rtol=0)


def test_tokens_see_nothing_behind_them():
    module, x = attention(n_heads=4, n_kv_heads=1), inputs()
    changed = x.clone()
    changed[:, 7] += 1
    before, after = run(module, x), run(module, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


def test_key_heads_that_do_not_divide_are_refused():
    from tests.runs import tiny_job
    from titan_lite.config.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        tiny_job(model={"attention": {"n_heads": 4, "n_kv_heads": 3}})
    (problem,) = error.value.problems
    assert (problem.key, problem.allowed) == ("model.attention.n_kv_heads", "1, 2, 4")


def test_context_is_only_read():
    module = attention(n_heads=4)
    context = context_for(module)
    module(inputs(), context)
    assert context.carry == {}
