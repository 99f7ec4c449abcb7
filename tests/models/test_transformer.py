"""The transformer against Hugging Face's Llama, and what must hold for any attention."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
"""fp32, two layers."""

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.output.weight": "lm_head.weight",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "attention_residual.norm": "input_layernorm",
    "ffn_residual.norm": "post_attention_layernorm",
    "stack.blocks": "model.layers",
}


def hf_name(name: str) -> str:
    if name == "norm.weight":
        return "model.norm.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize(("n_kv_heads", "tied", "head_dim"), [(2, False, 0), (4, True, 0), (1, False, 16)])
def test_against_transformers_llama(n_kv_heads: int, tied: bool, head_dim: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    attention = {"n_heads": 4, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "position": {"theta": 500000.0}}
    model = tiny_model(attention=attention, head={"tied": tied}, norm={"eps": 1e-6})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim or 8,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=tied,
    )
    reference = LlamaForCausalLM(config).eval()
    state = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])
    tokens = torch.randint(VOCAB, (2, 19))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("masks", [["causal"], ["causal", "document"]])
def test_tokens_change_nothing_before_them(masks: list[str]):
    model = tiny_model(attention={"n_heads": 4, "n_kv_heads": 2, "masks": masks})
    tokens = torch.randint(VOCAB, (2, 16))
    documents = torch.arange(16).expand(2, -1) // 10
    before = model(tokens, documents)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB
    after = model(changed, documents)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


def test_document_mask_equals_separate_documents():
    model = tiny_model(attention={"n_heads": 4, "n_kv_heads": 2, "masks": ["causal", "document"]})
    tokens = torch.randint(VOCAB, (1, 16))
    documents = (torch.arange(16) >= 10).int()[None]
    packed = model(tokens, documents)
    # Rotary positions are relative, so the second document may start at any of them.
    torch.testing.assert_close(packed[:, :10], model(tokens[:, :10]), atol=ATOL, rtol=0)
    torch.testing.assert_close(packed[:, 10:], model(tokens[:, 10:]), atol=ATOL, rtol=0)
    plain = tiny_model()(tokens, documents)
    assert not torch.allclose(packed[:, 10:], plain[:, 10:], atol=1e-4)


def test_specs_cover_parameters_and_tying_removes_one_matrix():
    untied, tied = tiny_model(), tiny_model(head={"tied": True})
    names = {name for name, _ in untied.named_parameters()} - {name for name, _ in tied.named_parameters()}
    assert names == {"head.output.weight"}
    assert collect_specs(untied)["head.output.weight"].role == "head"
    tied(torch.randint(VOCAB, (1, 4))).sum().backward()
    assert tied.embedding.weight.grad.count_nonzero(dim=1).all()


def test_a_slot_takes_a_name_a_table_or_its_default():
    assert tiny_config(norm="rmsnorm") == tiny_config() == tiny_config(norm={})
    assert tiny_config(norm={"eps": 1e-3}).norm.eps == 1e-3
