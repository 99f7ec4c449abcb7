"""OPT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from titan_lite.hf.architecture import Architecture
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.parts import Heads, linear, norm, pair
from titan_lite.hf.rule import Rule, below
from titan_lite.hf.setting import Activation, Key, View, nested
from titan_lite.models.block import Layer
from titan_lite.models.embedding import LowRankEmbedding
from titan_lite.models.transformer import Transformer

UNUSED_POSITIONS: Final = 2
"""Rows of their position table before that of the first token."""


class RowWidth:
    """`word_embed_proj_dim`: the width of a row of the embedding, where it is not the model's."""

    def to_hf(self, model: View) -> Tables:
        return {"word_embed_proj_dim": model.get("embedding.width") or model.get("dim")}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        width = settings["word_embed_proj_dim"]
        own = {} if width == settings["hidden_size"] else {"type": "low_rank", "width": width}
        return nested("embedding", own)


class OPTLike(Architecture):
    """Norms before the branches or behind them, absolute positions."""

    def outer_rules(self, model: Transformer.Config, image: Transformer.Config) -> Iterator[Rule]:
        yield pair("embedding.weight", "model.decoder.embed_tokens.weight")
        positions = "embedding.position.weight", "model.decoder.embed_positions.weight"
        yield pair(*positions, below(UNUSED_POSITIONS))
        last = model.last_norm(), image.last_norm()
        yield from norm("norm", "model.decoder.final_layer_norm", *last, model.dim)
        if isinstance(model.embedding, LowRankEmbedding.Config):
            yield pair("embedding.wide.weight", "model.decoder.project_in.weight")
            yield pair("head.narrow.weight", "model.decoder.project_out.weight")
        if not model.head.tied:
            yield pair("head.output.weight", "lm_head.weight")

    def layer_rules(self, index: int, ours: Layer, theirs: Layer, dim: int) -> Iterator[Rule]:
        mine, other = f"stack.blocks.{index}", f"model.decoder.layers.{index}"
        before = f"{mine}.attention_residual.norm", f"{other}.self_attn_layer_norm"
        yield from norm(*before, ours.norm, theirs.norm, dim)
        yield from norm(f"{mine}.ffn_residual.norm", f"{other}.final_layer_norm", ours.norm, theirs.norm, dim)
        attention: Any = ours.attention
        q, k, v = (f"{other}.self_attn.{p}_proj" for p in "qkv")
        heads = Heads(attention, theirs.attention, dim)
        yield from heads.rules(f"{mine}.attention", (q, k, v), their_bias=True)
        o = f"{mine}.attention.o", f"{other}.self_attn.out_proj"
        yield from linear(*o, "o" in attention.bias, True, dim)
        ffn: Any = ours.ffn
        yield from linear(f"{mine}.ffn.up", f"{other}.fc1", ffn.bias, True, ffn.hidden)
        yield from linear(f"{mine}.ffn.down", f"{other}.fc2", ffn.bias, True, dim)


OPT: Final = OPTLike(
    model_type="opt",
    class_name="OPTForCausalLM",
    keys=(
        Key("dim", "hidden_size"),
        Key("n_layers", "num_hidden_layers"),
        Key("ffn.hidden", "ffn_dim"),
        Key("attention.n_heads", "num_attention_heads"),
        Key("head.tied", "tie_word_embeddings"),
        Key(
            "residual.type",
            "do_layer_norm_before",
            lambda placement: placement == "pre",
            lambda before: "pre" if before else "post",
        ),
        RowWidth(),
        Key("embedding.position.max_len", "max_position_embeddings"),
        Activation("activation_function"),
    ),
    fixed={
        "embedding": {"position": {"type": "learned", "max_len": 1}},
        "norm": {"type": "layernorm", "eps": 1e-5},
        "attention": {"bias": ["q", "k", "v", "o"], "position": {"type": "none"}},
        "ffn": {"type": "mlp", "bias": True},
    },
    constants={"enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    training_only={"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
    context_key="",
)
"""OPT (arXiv 2205.01068), and its size 350m with norms behind the branches and narrow embeddings."""
