"""OLMo 2."""

from __future__ import annotations

from typing import Final

from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.rope import Rope
from titan_lite.hf.setting import Activation, Key, bias

OLMO2: Final = LlamaLike(
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "rms_norm_eps"),
        Key("attention.qk_norm.eps", "rms_norm_eps"),
        bias("attention_bias", "q", "k", "v", "o"),
        Activation(),
        Rope(),
    ),
    fixed={"residual": {"type": "out_only"}, "attention": {"qk_norm": {"type": "rms_full"}}},
    norms={
        "attention_residual.norm": "post_attention_layernorm",
        "ffn_residual.norm": "post_feedforward_layernorm",
    },
)
"""OLMo 2 (arXiv 2501.00656): norms behind the branches, queries and keys normalised over all heads."""
