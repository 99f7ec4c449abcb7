"""DeepSeek-V3."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from titan_lite.hf.moe import SIZES, TOP_K, Experts
from titan_lite.hf.normal_form import Tables
from titan_lite.hf.parts import linear, norm, pair
from titan_lite.hf.rope import Rope, row_order
from titan_lite.hf.rule import Rule, Transform, constant, reordered, times
from titan_lite.hf.setting import Key, View, nested
from titan_lite.hf.sparse import Sparse
from titan_lite.models.attention import MLA
from titan_lite.models.transformer import Transformer

FURTHER: Final = "num_nextn_predict_layers"
TOKEN_FIRST: Final = Transform(
    lambda t: tuple(x.roll(x.shape[1] // 2, dims=1) for x in t),
    lambda t: tuple(x.roll(x.shape[1] // 2, dims=1) for x in t),
    rowwise=True,
)
"""(D, 2 D), whose columns are for a hidden state and then for a token, the other way round."""
_LAYER: Final = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class SharedExperts:
    """Shared experts, which are counted there and are one network here."""

    def to_hf(self, model: View) -> Tables:
        hidden, width = model.get("ffn.shared_hidden"), model.get("ffn.experts.hidden")
        return {"n_shared_experts": max(1, round(hidden / width))}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        count = settings.get("n_shared_experts")
        return {} if count is None else nested("ffn.shared_hidden", count * settings["moe_intermediate_size"])


class LatentBias:
    """One switch for all matrices that may have a bias: the one that makes queries of the input is none of them."""

    def to_hf(self, model: View) -> Tables:
        return {"attention_bias": bool(model.get("attention.bias"))}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        compressed = ["q"] * bool(settings.get("q_lora_rank"))
        return nested("attention.bias", [*compressed, "kv", "o"] if settings.get("attention_bias") else [])


class FurtherTokens:
    """Modules that read what the head gets. There they always have experts, here what the last layer has."""

    def to_hf(self, model: View) -> Tables:
        known = model.get("mtp.type") == "modules" and model.layers[-1]["ffn"]["type"] == "moe"
        return {FURTHER: model.get("mtp.depth") if known else 0}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        depth = settings.get(FURTHER)
        return {"mtp": {"type": "modules", "reads": "normed", "depth": depth}} if depth else {}


@dataclass(frozen=True)
class DeepSeekV3(Experts):
    """Latent attention; behind some dense layers, experts of which one is shared; modules for further tokens."""

    def tables(self, settings: Mapping[str, Any]) -> Tables:
        dense = (settings.get("first_k_dense_replace") or 0) >= settings.get("num_hidden_layers", 0)
        return super().tables({**settings, FURTHER: 0} if dense else settings)

    def as_stored(self, settings: Mapping[str, Any], names: Callable[[], Collection[str]]) -> Tables:
        # transformers reads and writes models without them, and leaves the setting as it is.
        if settings[FURTHER] and not any(_layer(name) >= settings["num_hidden_layers"] for name in names()):
            return {**settings, FURTHER: 0}
        return dict(settings)

    def left_out(self, name: str, model: Transformer.Config) -> str:
        if _layer(name) < model.n_layers + _depth(model):
            return ""
        return (
            f"it belongs to a module that predicts further tokens ({FURTHER}), which stands behind the"
            f" {model.n_layers} layers (model.n_layers) and is not part of this model (model.mtp)"
        )

    def beside(self, model: Transformer.Config) -> list[Rule]:
        image = self._config(self._settings(model))
        ours, theirs = model.each_layer()[-1], image.each_layer()[-1]
        rules: list[Rule] = []
        for mine, other in _modules(model):
            for our_norm, their_norm in (("hidden_norm", "hnorm"), ("token_norm", "enorm")):
                rules += norm(f"{mine}.{our_norm}", f"{other}.{their_norm}", ours.norm, theirs.norm, model.dim)
            rules.append(pair(f"{mine}.join.weight", f"{other}.eh_proj.weight", TOKEN_FIRST))
            rules += self.block_rules(f"{mine}.block", other, ours, theirs, model.dim)
            last = model.norm_behind_last_layer(), image.norm_behind_last_layer()
            rules += norm(f"{mine}.norm", f"{other}.shared_head.norm", *last, model.dim)
        return rules

    def copies(self, model: Transformer.Config) -> Mapping[str, str]:
        table = "model.embed_tokens.weight"
        head = table if model.head.tied else "lm_head.weight"
        both = (("embed_tokens.weight", table), ("shared_head.head.weight", head))
        return {f"{other}.{name}": of for _, other in _modules(model) for name, of in both}

    def attention_rules(self, ours: str, theirs: str, config: Any, image: Any, dim: int) -> Iterator[Rule]:
        assert isinstance(config, MLA.Config)
        own, turned, rank = config.own_width(dim), config.rope_dim, config.kv_rank
        order = row_order(config.position, turned)[row_order(image.position, turned).argsort()]
        width = own + turned
        factor = config.score_scale(width) / image.score_scale(width)
        queries = reordered(torch.cat((torch.arange(own), own + order)))
        queries = queries >> times(1.0 if abs(factor - 1) < 1e-12 else factor)
        keys = reordered(torch.cat((torch.arange(rank), rank + order)))
        norms = config.latent_norm, image.latent_norm

        def has(part: str) -> tuple[bool, bool]:
            return part in config.bias, part in image.bias

        if config.q_rank:
            yield from linear(f"{ours}.q.down", f"{theirs}.q_a_proj", *has("q"), config.q_rank)
            yield from norm(f"{ours}.q.norm", f"{theirs}.q_a_layernorm", *norms, config.q_rank)
            yield pair(f"{ours}.q.up.weight", f"{theirs}.q_b_proj.weight", queries)
        else:
            yield pair(f"{ours}.q.weight", f"{theirs}.q_proj.weight", queries)
        down = f"{theirs}.kv_a_proj_with_mqa"
        yield from linear(f"{ours}.kv.down", down, *has("kv"), rank + turned, keys)
        yield from norm(f"{ours}.kv.norm", f"{theirs}.kv_a_layernorm", *norms, rank)
        yield pair(f"{ours}.kv.up.weight", f"{theirs}.kv_b_proj.weight")
        yield from linear(f"{ours}.o", f"{theirs}.o_proj", *has("o"), dim)

    def ffn_rules(self, ours: str, theirs: str, config: Any, image: Any, dim: int) -> Iterator[Rule]:
        yield from super().ffn_rules(ours, theirs, config, image, dim)
        if config.type != "moe":
            return
        for name in ("gate", "up", "down"):
            yield pair(f"{ours}.shared.ffn.{name}.weight", f"{theirs}.shared_experts.{name}_proj.weight")
        offset = f"{theirs}.gate.e_score_correction_bias"
        if config.offset.type == "load":
            yield pair(f"{ours}.offset.value", offset)
        else:
            yield Rule((), (offset,), constant(0.0, config.n_experts))


def _layer(name: str) -> int:
    """The number of the layer that one of their tensors belongs to; -1 = none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _depth(model: Transformer.Config) -> int:
    return len(model.mtp.weights())


def _modules(model: Transformer.Config) -> Iterator[tuple[str, str]]:
    """(our name, theirs) of each module for further tokens."""
    for k in range(1, 1 + _depth(model)):
        yield f"mtp.predictors.{k}", f"model.layers.{model.n_layers + k - 1}"


DEEPSEEK_V3: Final = DeepSeekV3(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    keys=(
        *SIZES,
        Key("attention.n_heads", "num_key_value_heads"),
        Key("attention.q_rank", "q_lora_rank", lambda rank: rank or None),
        Key("attention.kv_rank", "kv_lora_rank"),
        Key("attention.head_dim", "qk_nope_head_dim"),
        Key("attention.rope_dim", "qk_rope_head_dim"),
        Key("attention.value_dim", "v_head_dim"),
        LatentBias(),
        Rope(),
        Key(
            "attention.position.layout",
            "rope_interleave",
            lambda layout: layout == "interleaved",
            lambda neighbours: "interleaved" if neighbours else "half_split",
        ),
        Sparse(
            experts=(
                TOP_K,
                Key("ffn.n_experts", "n_routed_experts"),
                Key("ffn.experts.hidden", "moe_intermediate_size"),
                SharedExperts(),
                Key("ffn.router.normalize", "norm_topk_prob"),
                Key("ffn.router.scale", "routed_scaling_factor", back=float),
                Key("ffn.router.n_groups", "n_group"),
                Key("ffn.router.top_groups", "topk_group"),
            ),
            dense=(Key("ffn.hidden", "intermediate_size"),),
            which=lambda dense: {"first_k_dense_replace": len(dense)},
            dense_layers=lambda settings: list(range(settings["first_k_dense_replace"])),
            fixed={"router": {"type": "sigmoid"}, "offset": {"type": "load"}},
        ),
        FurtherTokens(),
    ),
    fixed={
        "attention": {
            "type": "mla",
            "latent_norm": {"type": "rmsnorm", "eps": 1e-6},
            # For models that have no latents, so that their image, which tells what has no place, is a model.
            "kv_rank": 512,
            "rope_dim": 64,
        }
    },
    constants={"hidden_act": "silu"},
)
"""DeepSeek-V3 and R1 (arXiv 2412.19437)."""
