"""Gemma 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.hf.llama import SIZES, LlamaLike
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.rope import Rope, position, rope_parameters
from titan_lite.hf.rule import plus
from titan_lite.hf.setting import Activation, Choice, Key, Setting, View, bias, nested
from titan_lite.hf.windows import GLOBAL, LOCAL, ByLayer, local_layers, masks, numbers, window


def _scalar(scale: float) -> int:
    """The `query_pre_attn_scalar`, a whole number in their config, next to a factor of the scores."""
    return max(1, round(scale**-2))


class PositionsByLayer:
    """Windows and rotary positions, both by kind of layer."""

    def to_hf(self, model: View) -> Tables:
        kinds = [LOCAL if window(layer["attention"]) else GLOBAL for layer in model.layers]
        found = {kind: layer["attention"].get("position", {}) for kind, layer in zip(kinds, model.layers, strict=True)}
        any_kind = found[kinds[0]]
        parameters = {kind: rope_parameters(found.get(kind, any_kind)) for kind in (LOCAL, GLOBAL)}
        return ByLayer().to_hf(model) | {"rope_parameters": parameters}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        parameters = settings["rope_parameters"]
        tables = nested("attention", {"masks": masks(None), "position": position(parameters[GLOBAL])})
        local = local_layers(settings)
        if not local:
            return tables
        there = {"masks": masks(settings["sliding_window"]), "position": position(parameters[LOCAL])}
        return tables | {"layers": [{"at": numbers(local), "attention": there}]}


class Causal:
    """Tokens that see those before them only. Encoders made of Gemma 3 (EmbeddingGemma) say that theirs see all."""

    def to_hf(self, model: View) -> Tables:
        return {}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        key = "use_bidirectional_attention"
        if value := settings.get(key):
            raise ConfigError.at(key, "is not supported: tokens see those before them only", value, code=CROSS_FIELD)
        return {}


SHARED: Final[tuple[Setting, ...]] = (
    *SIZES,
    Causal(),
    Key("norm.eps", "rms_norm_eps"),
    Key("attention.head_dim", "head_dim"),
    Key("attention.scale", "query_pre_attn_scalar", _scalar, lambda scalar: scalar**-0.5),
    bias("attention_bias", "q", "k", "v", "o"),
    Activation("hidden_activation"),
    Choice("attention.score", "attn_logit_softcapping", "softmax_capped", "cap", None, off="softmax"),
    Choice("head.logit_cap", "final_logit_softcapping", "tanh", "cap", None),
)
AROUND_BRANCHES: Final = {
    "attention_residual.norm_in": "input_layernorm",
    "attention_residual.norm_out": "post_attention_layernorm",
    "ffn_residual.norm_in": "pre_feedforward_layernorm",
    "ffn_residual.norm_out": "post_feedforward_layernorm",
}
"""Norms around each branch: our names and theirs."""
FIXED: Final[Tables] = {"embedding": {"scale": "sqrt_dim"}, "residual": {"type": "peri"}}
LESS_ONE: Final = plus(-1.0)
"""Gains are stored less 1."""

GEMMA2: Final = LlamaLike(
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    keys=(*SHARED, Rope(), ByLayer()),
    fixed=FIXED,
    norms=AROUND_BRANCHES,
    gain=LESS_ONE,
)
"""Gemma 2 (arXiv 2408.00118): a window in some layers, capped scores and logits."""

GEMMA3: Final = LlamaLike(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    keys=(*SHARED, Key("attention.qk_norm.eps", "rms_norm_eps"), PositionsByLayer()),
    fixed={**FIXED, "attention": {"qk_norm": {"type": "rms"}}},
    norms=AROUND_BRANCHES,
    gain=LESS_ONE,
)
"""Gemma 3, text (arXiv 2503.19786): normalised queries and keys, layers with a window and positions of their own."""
