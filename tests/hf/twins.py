"""A model of ours and its twin in transformers, with the same random weights."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_lite.config.merge import Layer, merged
from titan_lite.config.presets import preset
from titan_lite.hf import ARCHITECTURES, Architecture, to_hf
from titan_lite.hf.rule import Rule
from titan_lite.job import Job
from titan_lite.models.ffn.moe.router import GroupLimit, Router, Routing
from titan_lite.models.spec import named_state
from titan_lite.models.transformer import Transformer

VOCAB = 96
CONTEXT = 16384


class Twins(NamedTuple):
    """The same weights in both."""

    architecture: Architecture
    config: Transformer.Config
    ours: Transformer
    theirs: Any
    rules: list[Rule]

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of our model and of the twin."""
        with torch.no_grad():
            return self.ours(tokens), self.theirs(tokens).logits


def preset_config(name: str, flavor: str = "", **changes: Any) -> Transformer.Config:
    """A preset with `changes` as a file would make them."""
    tables = merged([preset(name, flavor, Job), Layer({"model": changes})], Job).tables
    return Transformer.Config.model_validate(tables["model"])


def randomise(model: nn.Module, std: float = 0.1) -> None:
    """Weights large enough for attention to choose; gains around 1 and biases around 0, so that all of them matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            buffer.copy_(std * torch.randn(buffer.shape, generator=generator))


def state(model: nn.Module) -> dict[str, Tensor]:
    """What a trained model is: parameters and buffers, without what the next step would count."""
    return {name: tensor for name, tensor in named_state(model) if not name.endswith("tally.count")}


def reference(architecture: Architecture, settings: dict[str, Any]) -> Any:
    """transformers' model with these settings, its weights not yet filled in."""
    import transformers

    cls = getattr(transformers, architecture.class_name)
    # Their MoE takes a head_dim that its config does not declare.
    known = {*inspect.signature(cls.config_class).parameters, *cls.config_class.attribute_map.values(), "head_dim"}
    assert settings.keys() <= known, f"unknown to {cls.config_class.__name__}: {settings.keys() - known}"
    config = cls.config_class(**settings, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    config._attn_implementation = "eager"
    return cls(config).eval()


def twins(model_type: str, config: Transformer.Config, std: float = 0.1) -> Twins:
    """Our model of this config and the twin, into which our weights were loaded."""
    architecture = ARCHITECTURES[model_type]
    ours = config.build(vocab_size=VOCAB).eval()
    randomise(ours, std)
    theirs = reference(architecture, architecture.settings(config, VOCAB, CONTEXT))
    rules = architecture.rules(config)
    missing, unexpected = theirs.load_state_dict(dict(to_hf(rules, state(ours))), strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"] * config.head.tied  # the embedding, seen a second time
    return Twins(architecture, config, ours, theirs, rules)


def routing_margin(model: nn.Module, tokens: Tensor) -> float:
    """How far the last expert or group that a token chose is from the next one, in scores; the smallest of all."""
    margins: list[float] = []

    def gap(scores: Tensor, k: int) -> None:
        best = scores.topk(k + 1).values
        margins.append((best[..., k - 1] - best[..., k]).min().item())

    def look(router: Router, args: tuple[Tensor, Tensor | None], routing: Routing) -> None:
        scores = routing.scores if args[1] is None else routing.scores + args[1]
        if isinstance(router.groups, GroupLimit):
            gap(scores.unflatten(-1, (router.groups.n_groups, -1)).topk(2).values.sum(-1), router.groups.top_groups)
        gap(router.groups(scores), router.top_k)

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, Router)]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return min(margins, default=float("inf"))


def random_tokens(length: int = 72) -> Tensor:
    """(2, length), longer than the windows of the debug models."""
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
