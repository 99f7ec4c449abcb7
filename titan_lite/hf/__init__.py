"""Hugging Face's architectures: configs and tensors of transformers' models as functions of ours, and back."""

from typing import Final

from titan_lite.hf.arcee import ARCEE
from titan_lite.hf.architecture import Architecture as Architecture
from titan_lite.hf.deepseek import DEEPSEEK_V3
from titan_lite.hf.gemma import GEMMA2, GEMMA3
from titan_lite.hf.gpt2 import GPT2
from titan_lite.hf.gpt_neox import GPT_NEOX
from titan_lite.hf.granite import GRANITE
from titan_lite.hf.llama import LLAMA
from titan_lite.hf.mistral import MISTRAL
from titan_lite.hf.moe import GPT_OSS, MIXTRAL, QWEN3_MOE
from titan_lite.hf.olmo2 import OLMO2
from titan_lite.hf.opt import OPT
from titan_lite.hf.qwen import QWEN2, QWEN3
from titan_lite.hf.rule import Rule as Rule
from titan_lite.hf.rule import from_hf as from_hf
from titan_lite.hf.rule import to_hf as to_hf
from titan_lite.hf.stablelm import STABLELM

ARCHITECTURES: Final[dict[str, Architecture]] = {
    architecture.model_type: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        OLMO2,
        GEMMA2,
        GEMMA3,
        STABLELM,
        GRANITE,
        ARCEE,
        GPT2,
        GPT_NEOX,
        OPT,
        MIXTRAL,
        QWEN3_MOE,
        GPT_OSS,
        DEEPSEEK_V3,
    )
}
"""By transformers' `model_type`; of two that can express a model, the simpler comes first."""
