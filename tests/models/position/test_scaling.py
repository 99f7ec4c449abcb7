"""Scaled frequencies against transformers' and rotary-embedding-torch's, and against what they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.models.position.turning import ATOL, context, position, queries_and_keys, turned
from titan_lite.models.position.scaling import Scaling

RTOL = 2e-6
"""fp32 frequencies."""
CPU = torch.device("cpu")
THETA = 500000.0

LLAMA_3_2 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"type": "linear", "factor": 3.0}, "linear", {"factor": 3.0}),
    ({"type": "dynamic_ntk", "factor": 2.5, "original_max_len": 64}, "dynamic", {"factor": 2.5}),
    ({"type": "llama3", "factor": 32.0, "original_max_len": 64}, "llama3", LLAMA_3_2),
    ({"type": "llama3", "factor": 2.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0, "original_max_len": 64},
     "llama3", {"factor": 2.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0}),
    ({"type": "yarn", "factor": 4.0, "original_max_len": 64}, "yarn", {"factor": 4.0}),
    ({"type": "yarn", "factor": 4.0, "original_max_len": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
     "yarn", {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0}),
    ({"type": "yarn", "factor": 4.0, "original_max_len": 64, "attention_factor": 1.25},
     "yarn", {"factor": 4.0, "attention_factor": 1.25}),
    ({"type": "yarn", "factor": 40.0, "original_max_len": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
     "yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}),
]  # fmt: skip


def hf_config(kind: str, keys: dict[str, Any], original: int, head_dim: int, fraction: float = 1.0) -> Any:
    """A Llama with this scaling."""
    from transformers import LlamaConfig

    rope = {"rope_type": kind, "rope_theta": THETA, "partial_rotary_factor": fraction, **keys}
    if kind != "linear":
        rope["original_max_position_embeddings"] = original
    # Only the dynamic scaling takes the length before scaling from here.
    longest = original if kind == "dynamic" else int(original * keys["factor"])
    return LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=longest, rope_parameters=rope
    )


def scaling(table: dict[str, Any], theta: float = THETA, width: int = 16) -> Scaling:
    built: Scaling = Scaling.Config.choose(table).build(theta=theta, width=width)
    return built


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(("table", "kind", "keys"), SCALINGS, ids=str)
def test_against_transformers(table: dict[str, Any], kind: str, keys: dict[str, Any], fraction: float):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf_config(kind, keys, table.get("original_max_len", 64), head_dim=64, fraction=fraction)
    plain = scaling({"type": "none"}, width=int(64 * fraction)).frequencies(0, CPU)
    for length in (20, 64, 200):
        expected, amplitude = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=length)
        ours = scaling(table, width=int(64 * fraction))
        torch.testing.assert_close(ours.frequencies(length, CPU), expected, atol=0, rtol=RTOL)
        cos, sin = ours.cos_sin(torch.zeros(1), length)
        assert (cos.item(), sin.item()) == (pytest.approx(amplitude, rel=1e-7), 0)
        assert torch.equal(ours.frequencies(length, CPU), plain) == (kind == "dynamic" and length <= 64)


@pytest.mark.parametrize(("table", "kind", "keys"), SCALINGS, ids=str)
def test_turned_heads_against_transformers(table: dict[str, Any], kind: str, keys: dict[str, Any]):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = queries_and_keys(length=100)
    reference = LlamaRotaryEmbedding(hf_config(kind, keys, table.get("original_max_len", 64), head_dim=16))
    theirs = apply_rotary_pos_emb(q, k, *reference(q, torch.arange(100)[None]))
    for mine, other in zip(turned(position(theta=THETA, scaling=table), q, k), theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=ATOL * 2, rtol=0)


def test_llama_3_2_as_published():
    """Waves shorter than 2048 positions stay, those longer than 8192 are 32 times as long."""
    table = {"type": "llama3", "original_max_len": 8192, **LLAMA_3_2}
    plain = scaling({"type": "none"}, width=64).frequencies(0, CPU)
    ratio = plain / scaling(table, width=64).frequencies(0, CPU)
    wave = 2 * math.pi / plain
    torch.testing.assert_close(ratio[wave < 2048], torch.ones_like(ratio[wave < 2048]), rtol=RTOL, atol=0)
    torch.testing.assert_close(ratio[wave > 8192], torch.full_like(ratio[wave > 8192], 32), rtol=RTOL, atol=0)
    between = ratio[(wave > 2048) & (wave < 8192)]
    assert len(between) > 1
    assert (between > 1).all()
    assert (between < 32).all()


def test_ntk_against_rotary_embedding_torch():
    from rotary_embedding_torch import RotaryEmbedding

    expected = RotaryEmbedding(dim=16, theta=10000, theta_rescale_factor=4.0).freqs
    torch.testing.assert_close(
        scaling({"type": "ntk", "factor": 4.0}, theta=10000.0).frequencies(0, CPU), expected.detach(), rtol=RTOL, atol=0
    )


@pytest.mark.parametrize(("length", "stretch"), [(100, 1.5), (128, 1.5), (256, 6.0), (512, 24.0)])
def test_lswt_in_closed_form(length: int, stretch: float):
    dynamic = scaling({"type": "lswt", "ntk_scale": 1.5, "train_len": 128})
    frequencies = dynamic.frequencies(length, CPU)
    expected = (THETA * stretch ** (16 / 14)) ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies, expected, rtol=RTOL, atol=0)
    slowest = scaling({"type": "none"}).frequencies(0, CPU)[-1] / frequencies[-1]
    assert (frequencies[0].item(), slowest.item()) == (1, pytest.approx(stretch, rel=1e-5))
    amplitude = 0.07 * math.log(max(length / 128, 1)) + 1
    assert dynamic.cos_sin(torch.zeros(1), length)[0].item() == pytest.approx(amplitude, rel=1e-6)


def test_lswt_multiplies_queries_and_keys():
    q, k = queries_and_keys(length=64)
    lswt = {"type": "lswt", "train_len": 16, "a": 0.5, "b": 2.0}
    for before, after in zip((q, k), turned(position(scaling=lswt), q, k), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), (0.5 * math.log(4) + 2) * before.norm(dim=-1), atol=0, rtol=1e-5)


def test_static_lswt_is_ntk():
    static = position(scaling={"type": "lswt", "ntk_scale": 3.0}).prepare(context(40))
    ntk = position(scaling={"type": "ntk", "factor": 3.0}).prepare(context(40))
    assert all(torch.equal(mine, other) for mine, other in zip(static, ntk, strict=True))
