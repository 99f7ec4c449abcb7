"""One matrix for queries, keys and values."""

from __future__ import annotations

import pytest
import torch

from tests.models.attention.alone import D, T, attention, inputs, run
from tests.runs import tiny_job
from titan_lite.config.errors import ConfigError
from titan_lite.models.attention import GroupedAttention

ATOL = 1e-6


def rows(parts: list[torch.Tensor], n_groups: int) -> torch.Tensor:
    """The rows of queries, keys and values as the fused matrix has them, group by group."""
    return torch.cat([part.chunk(n_groups)[g] for g in range(n_groups) for part in parts])


def fused_from(plain: GroupedAttention, n_kv_heads: int) -> dict[str, torch.Tensor]:
    state = plain.state_dict()
    fused = {name: value for name, value in state.items() if name[0] not in "qkv"}
    for kind in ("weight", "bias"):
        if f"q.{kind}" in state:
            fused[f"qkv.{kind}"] = rows([state[f"{name}.{kind}"] for name in "qkv"], n_kv_heads)
    return fused


@pytest.mark.parametrize(("n_kv_heads", "value_dim"), [(1, 0), (2, 6), (4, 0)])
@pytest.mark.parametrize("bias", [(), ("q", "k", "v"), ("o",)])
def test_equals_three_matrices(n_kv_heads: int, value_dim: int, bias: tuple[str, ...]):
    table = {"n_heads": 4, "n_kv_heads": n_kv_heads, "head_dim": 8, "value_dim": value_dim, "bias": bias}
    plain, fused = attention(**table), attention(type="gqa_fused", **table)
    fused.load_state_dict(fused_from(plain, n_kv_heads))
    x, upstream = inputs(), inputs(2)
    out, expected = run(fused, x), run(plain, x)
    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    grads = rows([plain.get_submodule(name).weight.grad for name in "qkv"], n_kv_heads)
    torch.testing.assert_close(fused.qkv.weight.grad, grads, atol=1e-5, rtol=0)


def test_a_cut_between_groups_leaves_whole_heads():
    """The upper half of the rows is the matrix of an attention with half of the heads: how ranks will share it."""
    table = {"type": "gqa_fused", "head_dim": 8, "value_dim": 6}
    whole, half = attention(n_heads=4, n_kv_heads=2, **table), attention(n_heads=2, n_kv_heads=1, **table)
    state = whole.state_dict()
    half.load_state_dict({"qkv.weight": state["qkv.weight"].chunk(2)[0], "o.weight": state["o.weight"].chunk(2, 1)[0]})
    for part, of_half in zip(whole.project(inputs()), half.project(inputs()), strict=True):
        torch.testing.assert_close(part.chunk(2, dim=1)[0], of_half, atol=ATOL, rtol=0)


def test_against_transformers_gpt_neox():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(
        hidden_size=D,
        num_attention_heads=4,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    config._attn_implementation = "sdpa"
    module = attention(type="gqa_fused", n_heads=4, bias=["q", "k", "v", "o"])
    reference = GPTNeoXAttention(config, 0)
    names = {"qkv": "query_key_value", "o": "dense"}
    state = {names[key.split(".")[0]] + "." + key.split(".")[1]: value for key, value in module.state_dict().items()}
    reference.load_state_dict(state)
    x = inputs()
    angles = GPTNeoXRotaryEmbedding(config)(x, torch.arange(T)[None])
    expected = reference(x, None, position_embeddings=angles)[0]
    torch.testing.assert_close(run(module, x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [["q"], ["k", "v", "o"]])
def test_a_bias_of_some_rows_is_refused(bias: list[str]):
    with pytest.raises(ConfigError) as error:
        tiny_job(model={"attention": {"type": "gqa_fused", "n_heads": 4, "bias": bias}})
    (problem,) = error.value.problems
    assert problem.key == "model.attention.bias"
    assert "gqa_fused" in problem.why
