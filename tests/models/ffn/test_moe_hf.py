"""Single expert layers of transformers, on the same weights; whole models are in tests/hf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.ffn.moe_cases import context, inputs, make
from titan_lite.models.ffn.moe import MoE

ATOL = 1e-5
"""fp32, one module, outputs of a few units."""
MARGIN = 1e-4
"""Between the last choice and the next, so that rounding cannot choose otherwise."""
E, K, DIM, HIDDEN = 16, 4, 24, 16


def clear(scores: Tensor, k: int) -> bool:
    """Whether no token's k-th best is within rounding of the next."""
    best = scores.topk(k + 1).values
    return bool((best[:, k - 1] - best[:, k]).min() > MARGIN)


def stacked(layer: MoE) -> dict[str, Tensor]:
    """As most of them store experts: gate above up, (E, out, in)."""
    x = layer.experts
    return {
        "experts.gate_up_proj": torch.cat((x.gate, x.up), dim=2).transpose(1, 2),
        "experts.down_proj": x.down.transpose(1, 2),
    }


def compare(layer: MoE, theirs: Any, weights: dict[str, Tensor]) -> None:
    theirs.load_state_dict({name: tensor.detach().contiguous() for name, tensor in weights.items()})
    x = inputs(4, 16)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(mine, context()), theirs(other)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert expected.std() > 0.1
    torch.testing.assert_close(y, expected, atol=ATOL, rtol=ATOL)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-4 * other.grad.abs().max().item(), rtol=0)


@pytest.mark.parametrize("n_group", [1, 4])
def test_deepseek_v3(n_group: int):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=E,
        n_shared_experts=2,
        num_experts_per_tok=K,
        n_group=n_group,
        topk_group=min(2, n_group),
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    groups = {"n_groups": n_group, "top_groups": min(2, n_group)}
    layer = make(
        "moe",
        n_experts=E,
        top_k=K,
        experts={"hidden": HIDDEN},
        router={"type": "sigmoid", "scale": 2.5, **groups},
        offset="load",
        shared_hidden=2 * HIDDEN,
    )
    layer.offset.value.copy_(torch.linspace(-0.3, 0.3, E).roll(5))
    ranked = torch.sigmoid(inputs(4, 16).flatten(0, 1) @ layer.router.weight.t()) + layer.offset.value
    assert clear(layer.router.groups(ranked), K)
    shared = {
        f"shared_experts.{name}_proj.weight": layer.shared.ffn.get_submodule(name).weight for name in ("gate", "up")
    }
    compare(
        layer,
        DeepseekV3MoE(config),
        {
            **stacked(layer),
            **shared,
            "shared_experts.down_proj.weight": layer.shared.ffn.down.weight,
            "gate.weight": layer.router.weight,
            "gate.e_score_correction_bias": layer.offset.value,
        },
    )


def test_gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=E, num_experts_per_tok=K, swiglu_limit=1.5
    )
    layer = make(
        "moe",
        n_experts=E,
        top_k=K,
        experts={"type": "clamped_swiglu", "hidden": HIDDEN, "bias": True, "limit": 1.5},
        router={"bias": True},
    )
    assert clear(layer.router(inputs(4, 16).flatten(0, 1), None).logits, K)
    x = layer.experts
    weights = {
        "experts.gate_up_proj": torch.stack((x.gate, x.up), dim=-1).flatten(2),  # their columns take turns
        "experts.gate_up_proj_bias": torch.stack((x.gate_bias, x.up_bias), dim=-1).flatten(1),
        "experts.down_proj": x.down,
        "experts.down_proj_bias": x.down_bias,
        "router.weight": layer.router.weight,
        "router.bias": layer.router.bias,
    }
    compare(layer, GptOssMLP(config), weights)


@pytest.mark.parametrize("normalize", [True, False])
def test_qwen3_moe(normalize: bool):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=normalize,
    )
    layer = make("moe", n_experts=E, top_k=K, experts={"hidden": HIDDEN}, router={"normalize": normalize})
    assert clear(layer.router(inputs(4, 16).flatten(0, 1), None).scores, K)
    compare(layer, Qwen3MoeSparseMoeBlock(config), {**stacked(layer), "gate.weight": layer.router.weight})


def test_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2)
    layer = make("moe", experts={"hidden": HIDDEN})
    assert clear(layer.router(inputs(4, 16).flatten(0, 1), None).scores, 2)
    compare(layer, MixtralSparseMoeBlock(config), {**stacked(layer), "gate.weight": layer.router.weight})
