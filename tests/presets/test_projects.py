"""The projects' own models against their definitions, in plain tensors, and the initial weights of all families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.hf.twins import VOCAB, preset_config, random_tokens, randomise
from titan_lite.config.presets import preset_names
from titan_lite.models.init import initialize
from titan_lite.models.position.scaling import Scaling
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
"""Logits of a few units, three layers, fp32."""

Weights = dict[str, Tensor]


def built(name: str, scaling: Any = "none") -> tuple[Any, Transformer, Weights]:
    config: Any = preset_config(name, n_layers=3)
    if scaling != "none":
        position = config.attention.position
        position = position.model_copy(update={"scaling": Scaling.Config.choose(scaling)})
        config = config.model_copy(update={"attention": config.attention.model_copy(update={"position": position})})
    model = config.build(vocab_size=VOCAB).eval()
    randomise(model)
    return config, model, dict(model.named_parameters())


def affine(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    root = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / root * w[f"{name}.weight"] + w[f"{name}.bias"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def turned(x: Tensor, times: Tensor, theta: float, pairs: Callable[[int], list[tuple[int, int]]]) -> Tensor:
    """x (B, H, T, Dh) with pair j of each head, as a complex number, turned by t * theta^(-2j / Dh)."""
    out, width = x.clone(), x.shape[-1]
    for j, (a, b) in enumerate(pairs(width)):
        number = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * times * theta ** (-2 * j / width))
        out[..., a], out[..., b] = number.real, number.imag
    return out


def halves(width: int) -> list[tuple[int, int]]:
    return [(j, j + width // 2) for j in range(width // 2)]


def neighbours(width: int) -> list[tuple[int, int]]:
    return [(2 * j, 2 * j + 1) for j in range(width // 2)]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, T, Dh), (B, G, T, Dh) twice -> (B, T, H Dh): each query head with its group's keys, causally."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def split(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def from_scratch(config: Any, w: Weights, tokens: Tensor) -> Tensor:
    width = config.dim // config.attention.n_heads
    times = torch.arange(tokens.shape[1])
    x = w["embedding.weight"][tokens] * math.sqrt(config.dim)
    for i in range(config.n_layers):
        b = f"stack.blocks.{i}"
        h = layer_norm(x, w, f"{b}.attention_residual.norm", 1e-6)
        q, k, v = (split(affine(h, w, f"{b}.attention.{p}"), width) for p in "qkv")
        q, k = (turned(y, times, 1e4, neighbours) for y in (q, k))
        x = x + affine(attend(q, k, v, width**-0.5), w, f"{b}.attention.o")
        h = layer_norm(x, w, f"{b}.ffn_residual.norm", 1e-6)
        gate = F.gelu(affine(h, w, f"{b}.ffn.gate"), approximate="tanh")
        x = x + affine(gate * affine(h, w, f"{b}.ffn.up"), w, f"{b}.ffn.down")
    return affine(layer_norm(x, w, "norm", 1e-6), w, "head.output")


def lswt(config: Any, w: Weights, tokens: Tensor) -> Tensor:
    width = config.dim // config.attention.n_heads
    times = torch.arange(tokens.shape[1]).flip(0)  # the newest token is at 0
    theta, size = 5e5, 1.0
    scaling = config.attention.position.scaling.model_dump()
    if scaling["type"] == "lswt":
        excess = max(tokens.shape[1] / scaling["train_len"], 1)
        theta *= (scaling["ntk_scale"] * excess**2) ** (width / (width - 2))
        size = scaling["a"] * math.log(excess) + scaling["b"]
    x = layer_norm(affine(w["embedding.weight"][tokens], w, "embedding.wide"), w, "embedding.norm", 1e-5)
    for i in range(config.n_layers):
        b = f"stack.blocks.{i}"
        h = layer_norm(x, w, f"{b}.attention_residual.norm", 1e-5)
        q, k, v = (split(affine(h, w, f"{b}.attention.{p}"), width) for p in "qkv")
        q, k = (size * turned(y, times, theta, halves) for y in (q, k))
        x = x + affine(attend(q, k, v, width**-0.5), w, f"{b}.attention.o")
        h = layer_norm(x, w, f"{b}.ffn_residual.norm", 1e-5)
        hidden = F.silu(affine(h, w, f"{b}.ffn.gate")) * affine(h, w, f"{b}.ffn.up")
        x = x + affine(hidden, w, f"{b}.ffn.down")
    narrow = affine(layer_norm(x, w, "norm", 1e-5), w, "head.narrow")
    return narrow @ w["embedding.weight"].T


def ngpt(config: Any, w: Weights, tokens: Tensor) -> Tensor:
    """The paper's update; a learned s is stored as s * scale / init (section 2.5)."""
    root = math.sqrt(config.dim)
    width = config.dim // config.attention.n_heads
    times = torch.arange(tokens.shape[1])
    x = w["embedding.weight"][tokens]
    for i in range(config.n_layers):
        b = f"stack.blocks.{i}"
        q, k, v = (split(x @ w[f"{b}.attention.{p}.weight"].T, width) for p in "qkv")
        q, k = (unit(turned(y, times, 1e4, halves)) for y in (q, k))
        s_qk = (w[f"{b}.attention.qk_norm.s_qk.value"] * root).unflatten(0, (-1, 1, width))  # (H, 1, Dh)
        y = attend(q * s_qk, k * s_qk, v, math.sqrt(width)) @ w[f"{b}.attention.o.weight"].T
        alpha = (w[f"{b}.attention_residual.alpha.value"] * 0.05 * root).abs()
        x = unit(x + alpha * (unit(y) - x))
        u = x @ w[f"{b}.ffn.up.weight"].T * w[f"{b}.ffn.s_u.value"]
        gate = x @ w[f"{b}.ffn.gate.weight"].T * w[f"{b}.ffn.s_v.value"] * root
        y = (u * F.silu(gate)) @ w[f"{b}.ffn.down.weight"].T
        alpha = (w[f"{b}.ffn_residual.alpha.value"] * 0.05 * root).abs()
        x = unit(x + alpha * (unit(y) - x))
    return x @ w["head.output.weight"].T * w["head.logit_scale.s_z.value"] * root


@pytest.mark.parametrize("project", [from_scratch, lswt, ngpt])
def test_logits_are_those_of_the_definition(project: Callable[[Any, Weights, Tensor], Tensor]) -> None:
    config, model, weights = built(project.__name__)
    tokens = random_tokens(24)
    with torch.no_grad():
        expected = project(config, weights, tokens)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(tokens), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("train_len", "longer"), [(8, 3), (24, 1), (100, 1)])
@torch.no_grad()
def test_lswt_over_texts_longer_than_those_of_its_training(train_len: int, longer: float) -> None:
    """Its context extension: beyond train_len, slower rotations and larger scores; up to it, the model as it was."""
    config, model, weights = built("lswt", {"type": "lswt", "train_len": train_len, "a": 0.3})
    tokens = random_tokens(24)
    logits = model(tokens)
    torch.testing.assert_close(logits, lswt(config, weights, tokens), atol=ATOL, rtol=0)
    plain = lswt(built("lswt")[0], weights, tokens)
    assert torch.allclose(logits, plain, atol=ATOL) == (longer == 1)


SMALL = math.sqrt(2 / (5 * 128))
# Standard deviations of (embedding, query matrix, what writes into the stream, head), where the sources say them.
STDS: dict[str, tuple[float, float, float, float]] = {
    "gpt2": (0.02, 0.02, 0.02 / math.sqrt(2 * 4), 0.02),
    "opt": (0.006, 0.006, 0.006 / math.sqrt(2 * 4), 0.006),
    "from_scratch": (0.02, 0.02, 0.02, 0.02),
    "lswt": (0.02, 0.02, 0.02, 0.02),
    "mega": (0.02, 0.02, 0.02, 0.02),
    "gpt_neox": (SMALL, SMALL, SMALL / math.sqrt(2 * 4), SMALL),
    "mu": (1.0, 1 / math.sqrt(128), 1 / math.sqrt(128), 1 / 128),
}


@pytest.mark.parametrize("name", preset_names())
def test_initial_weights(name: str) -> None:
    config = preset_config(name)
    model = config.build(vocab_size=512)
    initialize(model, collect_specs(model), config.init.build(dim=config.dim, n_layers=config.n_layers), seed=0)
    weights = dict(model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in weights.values())
    if name in STDS:
        head = "embedding.weight" if config.head.tied else "head.output.weight"
        names = ("embedding.weight", "stack.blocks.0.attention.q.weight", "stack.blocks.0.attention.o.weight", head)
        found = [weights[name].std().item() for name in names]
        assert found == pytest.approx(STDS[name], rel=0.05)
