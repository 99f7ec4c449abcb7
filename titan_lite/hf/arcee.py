"""Arcee."""

from __future__ import annotations

from typing import Final

from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.rope import Rope
from titan_lite.hf.setting import Activation, Key, bias

ARCEE: Final = LlamaLike(
    model_type="arcee",
    class_name="ArceeForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "rms_norm_eps"),
        Key("attention.head_dim", "head_dim"),
        bias("attention_bias", "q", "k", "v", "o"),
        Key("ffn.bias", "mlp_bias"),
        Activation(),
        Rope(),
    ),
    fixed={"ffn": {"type": "mlp"}},
)
"""AFM-4.5B (Arcee AI, 2025): Llama with an ungated feed-forward network of any activation; muP's models fit into it."""
