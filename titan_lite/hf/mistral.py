"""Mistral."""

from __future__ import annotations

from typing import Final

from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.rope import Rope
from titan_lite.hf.setting import Activation, Key
from titan_lite.hf.windows import EveryLayer

MISTRAL: Final = LlamaLike(
    model_type="mistral",
    class_name="MistralForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "rms_norm_eps"),
        Key("attention.head_dim", "head_dim"),
        Activation(),
        Rope(),
        EveryLayer(),
    ),
)
"""Mistral 7B (arXiv 2310.06825): Llama with a window in all layers, or without."""
