"""Mixtures of experts: Mixtral, Qwen3-MoE and gpt-oss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from titan_lite.hf.llama import LlamaLike
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.parts import pair
from titan_lite.hf.rope import Rope
from titan_lite.hf.rule import SAME, Rule, Transform
from titan_lite.hf.setting import Activation, Key, Setting, bias
from titan_lite.hf.sparse import Sparse
from titan_lite.hf.windows import ByLayer, EveryLayer

SIZES: Final[tuple[Setting, ...]] = (
    Key("dim", "hidden_size"),
    Key("n_layers", "num_hidden_layers"),
    Key("attention.n_heads", "num_attention_heads"),
    Key("norm.eps", "rms_norm_eps"),
    Key("head.tied", "tie_word_embeddings"),
)
GROUPED: Final[tuple[Setting, ...]] = (
    *SIZES,
    Key("attention.n_kv_heads", "num_key_value_heads"),
    Key("attention.head_dim", "head_dim"),
)
TOP_K: Final = Key("ffn.top_k", "num_experts_per_tok")
TRANSPOSED: Final = Transform(
    lambda t: tuple(x.transpose(-1, -2).contiguous() for x in t),
    lambda t: tuple(x.transpose(-1, -2).contiguous() for x in t),
)
"""Each expert's matrix (in, out) becomes (out, in)."""
ABOVE: Final = TRANSPOSED >> Transform(lambda t: (torch.cat(t, dim=1),), lambda t: t[0].chunk(2, dim=1))
"""gate and up (E, in, out) become one (E, 2 out, in): of each expert the gate's rows above the others."""
ALTERNATING: Final = Transform(
    lambda t: (torch.stack(t, dim=-1).flatten(-2),), lambda t: (t[0][..., ::2], t[0][..., 1::2])
)
"""The last dims of gate and up become one in which their entries take turns."""


@dataclass(frozen=True)
class Experts(LlamaLike):
    """Llama with experts, in every layer or in some."""

    router: str = "gate"
    """Their name of it."""
    gate_up: Transform = ABOVE
    """What becomes of the experts' first matrices; their biases are stored as `gate_up_bias`."""
    down: Transform = TRANSPOSED
    """What becomes of the experts' last matrices."""
    biased: bool = False
    """Whether there are biases on the router and on the experts."""

    def ffn_rules(self, ours: str, theirs: str, config: Any, image: Any, dim: int) -> Iterator[Rule]:
        if config.type != "moe":
            yield from super().ffn_rules(ours, theirs, config, image, dim)
            return
        yield pair(f"{ours}.router.weight", f"{theirs}.{self.router}.weight")
        first = (f"{ours}.experts.gate", f"{ours}.experts.up")
        yield Rule(first, (f"{theirs}.experts.gate_up_proj",), self.gate_up)
        yield pair(f"{ours}.experts.down", f"{theirs}.experts.down_proj", self.down)
        if self.biased:
            yield pair(f"{ours}.router.bias", f"{theirs}.{self.router}.bias")
            biases = tuple(f"{name}_bias" for name in first)
            yield Rule(biases, (f"{theirs}.experts.gate_up_proj_bias",), self.gate_up)
            yield pair(f"{ours}.experts.down_bias", f"{theirs}.experts.down_proj_bias")


@dataclass(frozen=True)
class Qwen3Moe(Experts):
    """Experts whose number has two names: the one in published files, and the one that transformers calls it inside."""

    def tables(self, settings: Mapping[str, Any]) -> Tables:
        given = {"num_experts": settings.get("num_local_experts"), **settings}
        # A step and a list are two ways to say which layers are dense.
        if step := given.get("decoder_sparse_step"):
            listed = set(given.get("mlp_only_layers") or ())
            layers = range(given.get("num_hidden_layers", 0))
            given["mlp_only_layers"] = [i for i in layers if i in listed or (i + 1) % step]
            given["decoder_sparse_step"] = 1
        return super().tables(given)


@dataclass(frozen=True)
class GptOss(Experts):
    """Experts with biases, and attention with a sink."""

    def attention_rules(self, ours: str, theirs: str, config: Any, image: Any, dim: int) -> Iterator[Rule]:
        yield from super().attention_rules(ours, theirs, config, image, dim)
        yield pair(f"{ours}.sink.logit", f"{theirs}.sinks")


MIXTRAL: Final = Experts(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    keys=(
        *GROUPED,
        TOP_K,
        Key("ffn.n_experts", "num_local_experts"),
        Key("ffn.experts.hidden", "intermediate_size"),
        Activation(ours="ffn.experts.activation"),
        Rope(),
        EveryLayer(),
    ),
    fixed={"ffn": {"type": "moe"}},
)
"""Mixtral 8x7B and 8x22B (arXiv 2401.04088)."""

QWEN3_MOE: Final = Qwen3Moe(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    keys=(
        *GROUPED,
        Key("attention.qk_norm.eps", "rms_norm_eps"),
        bias("attention_bias", "q", "k", "v", "o"),
        Rope(),
        Sparse(
            experts=(
                TOP_K,
                Key("ffn.n_experts", "num_experts"),
                Key("ffn.experts.hidden", "moe_intermediate_size"),
                Key("ffn.router.normalize", "norm_topk_prob"),
                Activation(ours="ffn.experts.activation"),
            ),
            dense=(Key("ffn.hidden", "intermediate_size"), Activation()),
            which=lambda dense: {"mlp_only_layers": dense},
            dense_layers=lambda settings: list(settings["mlp_only_layers"]),
        ),
    ),
    fixed={"attention": {"qk_norm": {"type": "rms"}}},
    constants={"decoder_sparse_step": 1, "use_sliding_window": False},
)
"""Qwen3-30B-A3B and 235B-A22B (arXiv 2505.09388), with experts in all layers or in some."""

GPT_OSS: Final = GptOss(
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    keys=(
        *GROUPED,
        TOP_K,
        bias("attention_bias", "q", "k", "v", "o"),
        Key("ffn.n_experts", "num_local_experts"),
        Key("ffn.experts.hidden", "intermediate_size"),
        Key("ffn.experts.limit", "swiglu_limit"),
        Key("ffn.experts.alpha", "swiglu_alpha"),
        Rope(),
        ByLayer(),
    ),
    fixed={
        "attention": {"sink": {"type": "logit"}, "kernel": "eager"},
        "ffn": {
            "type": "moe",
            "router": {"type": "softmax", "bias": True},
            "experts": {"type": "clamped_swiglu", "bias": True},
        },
    },
    router="router",
    gate_up=ALTERNATING,
    down=SAME,
    biased=True,
)
"""gpt-oss 20b and 120b (arXiv 2508.10925)."""
