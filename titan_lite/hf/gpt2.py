"""GPT-2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from titan_lite.hf.architecture import Architecture
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.parts import Heads, linear, norm, pair
from titan_lite.hf.rule import TRANSPOSED, Rule, joined
from titan_lite.hf.setting import Activation, Key
from titan_lite.models.block import Layer
from titan_lite.models.transformer import Transformer


class GPT2Like(Architecture):
    """Matrices are stored transposed; queries, keys and values come from one."""

    def tables(self, settings: Mapping[str, Any]) -> Tables:
        return super().tables({**settings, "n_inner": settings["n_inner"] or 4 * settings["n_embd"]})

    def outer_rules(self, model: Transformer.Config, image: Transformer.Config) -> Iterator[Rule]:
        yield pair("embedding.weight", "transformer.wte.weight")
        yield pair("embedding.position.weight", "transformer.wpe.weight")
        yield from norm("norm", "transformer.ln_f", model.last_norm(), image.last_norm(), model.dim)
        if not model.head.tied:
            yield pair("head.output.weight", "lm_head.weight")

    def layer_rules(self, index: int, ours: Layer, theirs: Layer, dim: int) -> Iterator[Rule]:
        mine, other = f"stack.blocks.{index}", f"transformer.h.{index}"
        yield from norm(f"{mine}.attention_residual.norm", f"{other}.ln_1", ours.norm, theirs.norm, dim)
        yield from norm(f"{mine}.ffn_residual.norm", f"{other}.ln_2", ours.norm, theirs.norm, dim)
        attention: Any = ours.attention
        heads = Heads(attention, theirs.attention, dim)
        one = joined(*heads.sizes)
        matrix = heads.names(f"{mine}.attention", "weight")
        yield Rule(matrix, (f"{other}.attn.c_attn.weight",), heads.transform("weight") >> one >> TRANSPOSED)
        vector = heads.names(f"{mine}.attention", "bias")
        yield Rule(vector, (f"{other}.attn.c_attn.bias",), heads.transform("bias") >> one)
        o = "o" in attention.bias
        yield from linear(f"{mine}.attention.o", f"{other}.attn.c_proj", o, True, dim, TRANSPOSED)
        ffn: Any = ours.ffn
        yield from linear(f"{mine}.ffn.up", f"{other}.mlp.c_fc", ffn.bias, True, ffn.hidden, TRANSPOSED)
        yield from linear(f"{mine}.ffn.down", f"{other}.mlp.c_proj", ffn.bias, True, dim, TRANSPOSED)


GPT2: Final = GPT2Like(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    keys=(
        Key("dim", "n_embd"),
        Key("n_layers", "n_layer"),
        Key("attention.n_heads", "n_head"),
        Key("ffn.hidden", "n_inner"),
        Key("norm.eps", "layer_norm_epsilon"),
        Key("embedding.position.max_len", "n_positions"),
        Key("head.tied", "tie_word_embeddings"),
        Activation("activation_function"),
    ),
    fixed={
        "embedding": {"position": {"type": "learned", "max_len": 1}},
        "norm": {"type": "layernorm"},
        "attention": {"bias": ["q", "k", "v", "o"], "position": {"type": "none"}},
        "ffn": {"type": "mlp", "bias": True},
    },
    constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    training_only={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    context_key="",
)
"""GPT-2 (Radford et al., 2019)."""
