"""Gates on the heads' output."""

from __future__ import annotations

import pytest
import torch

from tests.models.attention.alone import D, T, attention, inputs, run

ATOL = 1e-5


@pytest.mark.parametrize(("kind", "width"), [("head", 1), ("element", 6)])
def test_closed_form(kind: str, width: int):
    table = {"n_heads": 4, "n_kv_heads": 2, "value_dim": 6}
    gated, plain = attention(**table, gate=kind), attention(**table)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gate")})
    gate = gated.gate.linear.weight
    assert gate.shape == (4 * width, D)
    x = inputs()
    heads: list[torch.Tensor] = []
    plain.o.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    run(plain, x)
    factors = torch.sigmoid(x @ gate.t()).repeat_interleave(6 // width, dim=-1)  # (B, T, H * Dv)
    torch.testing.assert_close(run(gated, x), (heads[0] * factors) @ plain.o.weight.t(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["head", "element"])
def test_a_gate_of_zeros_is_half_open(kind: str):
    gated, plain = attention(n_heads=4, gate=kind), attention(n_heads=4)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gate")})
    torch.nn.init.zeros_(gated.gate.linear.weight)
    torch.testing.assert_close(run(gated, inputs()), run(plain, inputs()) / 2, atol=ATOL, rtol=0)


def test_against_transformers_qwen3_next():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    config = Qwen3NextConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    config._attn_implementation = "sdpa"
    module = attention(n_heads=4, n_kv_heads=2, head_dim=8, gate="element", qk_norm="rms")
    reference = Qwen3NextAttention(config, 0)
    q, gate = (weight.unflatten(0, (4, 8)) for weight in (module.q.weight, module.gate.linear.weight))
    state = {
        "q_proj.weight": torch.cat((q, gate), dim=1).flatten(0, 1),  # each head's query, then its gate
        "k_proj.weight": module.k.weight,
        "v_proj.weight": module.v.weight,
        "o_proj.weight": module.o.weight,
        "q_norm.weight": module.qk_norm.q.weight - 1,  # its gains are 1 + weight
        "k_norm.weight": module.qk_norm.k.weight - 1,
    }
    reference.load_state_dict(state)
    x = inputs()
    angles = Qwen3NextRotaryEmbedding(config)(x, torch.arange(T)[None])
    torch.testing.assert_close(run(module, x), reference(x, angles, None)[0], atol=ATOL, rtol=0)
