"""GPT-NeoX and Pythia."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from titan_lite.hf.architecture import Architecture
from titan_lite.hf.parts import Heads, Kind, linear, norm, pair
from titan_lite.hf.rope import Rope
from titan_lite.hf.rule import Rule, joined_by_group
from titan_lite.hf.setting import Activation, Key, bias
from titan_lite.models.block import Layer
from titan_lite.models.transformer import Transformer


class GPTNeoXLike(Architecture):
    """The rows that make the query, the key and the value of a head stand together."""

    def outer_rules(self, model: Transformer.Config, image: Transformer.Config) -> Iterator[Rule]:
        yield pair("embedding.weight", "gpt_neox.embed_in.weight")
        yield from norm("norm", "gpt_neox.final_layer_norm", model.last_norm(), image.last_norm(), model.dim)
        if not model.head.tied:
            yield pair("head.output.weight", "lm_head.weight")

    def layer_rules(self, index: int, ours: Layer, theirs: Layer, dim: int) -> Iterator[Rule]:
        mine, other = f"stack.blocks.{index}", f"gpt_neox.layers.{index}"
        for our_norm, their_norm in (("attention", "input"), ("ffn", "post_attention")):
            both = f"{mine}.{our_norm}_residual.norm", f"{other}.{their_norm}_layernorm"
            yield from norm(*both, ours.norm, theirs.norm, dim)
        attention: Any = ours.attention
        image: Any = theirs.attention
        heads = Heads(attention, image, dim)
        by_head = joined_by_group(heads.n_heads, *[heads.width] * 3)
        kinds: tuple[Kind, ...] = ("weight", "bias") if image.bias else ("weight",)
        for kind in kinds:
            names = heads.names(f"{mine}.attention", kind)
            yield Rule(names, (f"{other}.attention.query_key_value.{kind}",), heads.transform(kind) >> by_head)
        o = "o" in attention.bias, "o" in image.bias
        yield from linear(f"{mine}.attention.o", f"{other}.attention.dense", *o, dim)
        ffn: Any = ours.ffn
        yield from linear(f"{mine}.ffn.up", f"{other}.mlp.dense_h_to_4h", ffn.bias, True, ffn.hidden)
        yield from linear(f"{mine}.ffn.down", f"{other}.mlp.dense_4h_to_h", ffn.bias, True, dim)


GPT_NEOX: Final = GPTNeoXLike(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    keys=(
        Key("dim", "hidden_size"),
        Key("n_layers", "num_hidden_layers"),
        Key("ffn.hidden", "intermediate_size"),
        Key("attention.n_heads", "num_attention_heads"),
        Key("head.tied", "tie_word_embeddings"),
        Key("norm.eps", "layer_norm_eps"),
        Key(
            "block.type",
            "use_parallel_residual",
            lambda block: block == "parallel",
            lambda on: "parallel" if on else "sequential",
        ),
        bias("attention_bias", "q", "k", "v", "o"),
        Activation(),
        Rope(partial=True),
    ),
    fixed={"norm": {"type": "layernorm"}, "ffn": {"type": "mlp", "bias": True}},
)
"""GPT-NeoX-20B and Pythia (arXiv 2204.06745, 2304.01373)."""
