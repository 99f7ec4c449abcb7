"""StableLM."""

from __future__ import annotations

from typing import Final

from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.rope import Rope
from titan_lite.hf.setting import Activation, Key, bias

STABLELM: Final = LlamaLike(
    model_type="stablelm",
    class_name="StableLmForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "layer_norm_eps"),
        bias("use_qkv_bias", "q", "k", "v"),
        Activation(),
        Rope(partial=True),
    ),
    fixed={"norm": {"type": "layernorm"}},
    constants={"qk_layernorm": False, "use_parallel_residual": False},
)
"""StableLM-3B-4E1T and Stable LM 2 1.6B (arXiv 2402.17834): Llama with LayerNorm and partly rotated heads."""
