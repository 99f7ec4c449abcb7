"""Configs of transformers' models with experts, read as they are published: what they say in other words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hf.twins import VOCAB, preset_config, random_tokens, routing_margin
from titan_lite.config.errors import ConfigError
from titan_lite.hf import ARCHITECTURES, from_hf
from titan_lite.models.ffn import GLU, MoE
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
MARGIN = 1e-5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
QWEN3: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every third layer": ({"decoder_sparse_step": 3}, [0, 1, 3, 4]),
    "a list": ({"mlp_only_layers": [1, 4]}, [1, 4]),
    "both": ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 2, 3, 4]),
    "no experts at all": ({"decoder_sparse_step": 7}, [0, 1, 2, 3, 4, 5]),
}
"""Settings, and the dense ones of six layers."""


def agree(model_type: str, config: Any) -> Transformer.Config:
    """The model that is read from a new model of transformers; it computes the same."""
    import transformers

    architecture = ARCHITECTURES[model_type]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = getattr(transformers, architecture.class_name)(config).eval()
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *(b for n, b in theirs.named_buffers() if n.endswith("correction_bias"))):
            tensor.add_(0.1 * torch.randn(tensor.shape))
    ours_config = Transformer.Config.model_validate(architecture.tables(config.to_dict()))
    ours = ours_config.build(vocab_size=VOCAB).eval()
    read = dict(from_hf(architecture.rules(ours_config), theirs.state_dict()))
    missing, unexpected = ours.load_state_dict(read, strict=False)
    assert unexpected == []
    assert all(name.startswith("mtp.") or name.endswith("tally.count") for name in missing)
    tokens = random_tokens(24)
    assert routing_margin(ours, tokens) > MARGIN
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=ATOL, rtol=0)
    return ours_config


@pytest.mark.parametrize("name", QWEN3)
def test_dense_layers_of_qwen3_moe(name: str) -> None:
    from transformers import Qwen3MoeConfig

    changes, dense = QWEN3[name]
    config = Qwen3MoeConfig(
        **SIZES, **changes, num_hidden_layers=6, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, head_dim=8
    )
    layers = agree("qwen3_moe", config).each_layer()
    assert [i for i, layer in enumerate(layers) if isinstance(layer.ffn, GLU.Config)] == dense
    assert sum(isinstance(layer.ffn, MoE.Config) for layer in layers) == 6 - len(dense)


@pytest.mark.parametrize("q_lora_rank", [None, 12])
@pytest.mark.parametrize("dense", [0, 2, 4])
def test_deepseek_v3_as_published(q_lora_rank: int | None, dense: int) -> None:
    """With the older spelling of the scaling, and with a module that predicts a token more."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **SIZES,
        num_hidden_layers=4,
        first_k_dense_replace=dense,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
        rope_theta=100.0,
        max_position_embeddings=80,
        rope_scaling={
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 20,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    model = agree("deepseek_v3", config)
    assert [isinstance(layer.ffn, GLU.Config) for layer in model.each_layer()] == [i < dense for i in range(4)]
    assert len(model.mtp.weights()) == (dense < 4)  # its module has experts, and ours is like the last layer


def test_tensors_of_a_prediction_module_are_known() -> None:
    architecture = ARCHITECTURES["deepseek_v3"]
    names = [f"model.layers.61.{name}" for name in ("eh_proj.weight", "enorm.weight", "self_attn.o_proj.weight")]
    for mtp, wanted in (("none", False), ({}, True)):
        model = preset_config("deepseek_v3", "671B", mtp=mtp)
        read = {name for rule in architecture.rules(model) + architecture.beside(model) for name in rule.theirs}
        unknown = (*read, "model.layers.6.unknown", "unknown")
        assert not any(architecture.left_out(name, model) for name in unknown)
        for name in names:
            assert (name in read) == wanted
            assert ("(num_nextn_predict_layers)" in architecture.left_out(name, model)) != wanted
        assert "(num_nextn_predict_layers)" in architecture.left_out("model.layers.62.eh_proj.weight", model)
    assert not ARCHITECTURES["llama"].left_out("model.layers.61.eh_proj.weight", preset_config("llama3", "1B"))


def test_a_list_of_dense_layers_must_be_there() -> None:
    architecture = ARCHITECTURES["qwen3_moe"]
    settings = architecture.settings(preset_config("qwen3_moe"), VOCAB, 64)
    with pytest.raises(ConfigError, match="mlp_only_layers\n    is missing"):
        architecture.tables({k: v for k, v in settings.items() if k not in ("mlp_only_layers", "decoder_sparse_step")})
