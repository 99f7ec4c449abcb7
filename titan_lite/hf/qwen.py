"""Qwen 2 and 3."""

from __future__ import annotations

from typing import Final

from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.rope import Rope
from titan_lite.hf.setting import Activation, Key, bias
from titan_lite.hf.windows import ByLayer

QWEN2: Final = LlamaLike(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    keys=(*SIZES, Key("norm.eps", "rms_norm_eps"), Activation(), Rope(), ByLayer(switch=True)),
    fixed={"attention": {"bias": ["q", "k", "v"]}},
)
"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on queries, keys and values."""

QWEN3: Final = LlamaLike(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "rms_norm_eps"),
        Key("attention.qk_norm.eps", "rms_norm_eps"),
        Key("attention.head_dim", "head_dim"),
        bias("attention_bias", "q", "k", "v", "o"),
        Activation(),
        Rope(),
        ByLayer(switch=True),
    ),
    fixed={"attention": {"qk_norm": {"type": "rms"}}},
)
"""Qwen3, dense (arXiv 2505.09388): normalised queries and keys, with the eps of all norms."""
