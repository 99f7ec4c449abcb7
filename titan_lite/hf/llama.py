"""Llama, and what its relatives share with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from titan_lite.hf.architecture import Architecture
from titan_lite.hf.parts import Heads, linear, norm, pair
from titan_lite.hf.rope import Rope
from titan_lite.hf.rule import SAME, Rule, Transform, each
from titan_lite.hf.setting import Activation, Key, Setting, bias
from titan_lite.models.block import Layer
from titan_lite.models.transformer import Transformer

BEFORE_BRANCHES: Final = {
    "attention_residual.norm": "input_layernorm",
    "ffn_residual.norm": "post_attention_layernorm",
}
"""Norms before the branches: our names and theirs."""
SIZES: Final[tuple[Setting, ...]] = (
    Key("dim", "hidden_size"),
    Key("n_layers", "num_hidden_layers"),
    Key("ffn.hidden", "intermediate_size"),
    Key("attention.n_heads", "num_attention_heads"),
    Key("attention.n_kv_heads", "num_key_value_heads"),
    Key("head.tied", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class LlamaLike(Architecture):
    """Tensors that are called as in Llama."""

    norms: dict[str, str] = field(default_factory=lambda: BEFORE_BRANCHES)
    """Norms of a layer: our names and theirs."""
    gain: Transform = SAME
    """What becomes of gains."""

    def outer_rules(self, model: Transformer.Config, image: Transformer.Config) -> Iterator[Rule]:
        yield pair("embedding.weight", "model.embed_tokens.weight")
        yield from norm("norm", "model.norm", model.last_norm(), image.last_norm(), model.dim, self.gain)
        if not model.head.tied:
            yield pair("head.output.weight", "lm_head.weight")

    def layer_rules(self, index: int, ours: Layer, theirs: Layer, dim: int) -> Iterator[Rule]:
        yield from self.block_rules(f"stack.blocks.{index}", f"model.layers.{index}", ours, theirs, dim)

    def block_rules(self, mine: str, other: str, ours: Layer, theirs: Layer, dim: int) -> Iterator[Rule]:
        """Those of a block, of which `mine` and `other` are the names."""
        for our_norm, their_norm in self.norms.items():
            yield from norm(f"{mine}.{our_norm}", f"{other}.{their_norm}", ours.norm, theirs.norm, dim, self.gain)
        yield from self.attention_rules(
            f"{mine}.attention", f"{other}.self_attn", ours.attention, theirs.attention, dim
        )
        yield from self.ffn_rules(f"{mine}.ffn", f"{other}.mlp", ours.ffn, theirs.ffn, dim)

    def ffn_rules(self, ours: str, theirs: str, config: Any, image: Any, dim: int) -> Iterator[Rule]:
        """Those of the feed-forward branch."""
        widths = {"gate": config.hidden, "up": config.hidden, "down": dim}
        if config.type == "mlp":
            del widths["gate"]
        for name, width in widths.items():
            yield from linear(f"{ours}.{name}", f"{theirs}.{name}_proj", config.bias, image.bias, width)

    def attention_rules(self, ours: str, theirs: str, config: Any, image: Any, dim: int) -> Iterator[Rule]:
        """Those of the attention."""
        heads = Heads(config, image, dim)
        q, k, v = (f"{theirs}.{p}_proj" for p in "qkv")
        yield from heads.rules(ours, (q, k, v), bool({"q", "k", "v"} & set(image.bias)))
        yield from linear(f"{ours}.o", f"{theirs}.o_proj", "o" in config.bias, "o" in image.bias, dim)
        if image.qk_norm.type != "none":
            for p in "qk":
                yield pair(f"{ours}.qk_norm.{p}.weight", f"{theirs}.{p}_norm.weight", each(heads.order) >> self.gain)


LLAMA: Final = LlamaLike(
    model_type="llama",
    class_name="LlamaForCausalLM",
    keys=(
        *SIZES,
        Key("norm.eps", "rms_norm_eps"),
        Key("attention.head_dim", "head_dim"),
        bias("attention_bias", "q", "k", "v", "o"),
        Key("ffn.bias", "mlp_bias"),
        Activation(),
        Rope(),
    ),
)
"""Llama 1 to 3.2 (arXiv 2302.13971, 2307.09288, 2407.21783)."""
