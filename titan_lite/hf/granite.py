"""Granite."""

from __future__ import annotations

from typing import Final

from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.rope import Rope
from titan_lite.hf.setting import Activation, Choice, Key, bias

GRANITE: Final = LlamaLike(
    model_type="granite",
    class_name="GraniteForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "rms_norm_eps"),
        bias("attention_bias", "q", "k", "v", "o"),
        Key("ffn.bias", "mlp_bias"),
        Activation(),
        Rope(),
        Key("embedding.scale", "embedding_multiplier", back=float),
        Key("attention.scale", "attention_multiplier", back=float),
        Choice("residual.scale", "residual_multiplier", "constant", "value", 1.0),
        Choice("head.logit_scale", "logits_scaling", "constant", "value", 1.0, lambda value: 1 / value),
    ),
)
"""Granite 3, dense: Llama with a multiplier on embeddings, scores, branches and logits."""
