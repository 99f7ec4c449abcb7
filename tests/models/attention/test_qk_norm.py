"""Norms of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.attention.alone import D, T, attention, inputs, run
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache
from titan_lite.models.attention import QKNorm
from titan_lite.models.attention.qk_norm import L2ScaledQKNorm
from titan_lite.models.position.rope import RoPE

ATOL = 1e-5
H, G, DH = 4, 2, 8
TINY = 1e-30
"""An eps that no square mean here is near to."""
NORMS: dict[str, dict[str, Any]] = {
    "rms": {"eps": TINY},
    "rms_per_head": {"eps": TINY},
    "rms_full": {"eps": TINY},
    "rms_gainless": {"eps": TINY},
    "l2_scaled": {},
}
kinds = pytest.mark.parametrize("kind", list(NORMS))


def norm(kind: str, n_kv_heads: int = G, **table: Any) -> QKNorm:
    """A norm by itself, its gains random around 1."""
    config = QKNorm.Config.choose({"type": kind, **table})
    module = config.build(dim=D, n_heads=H, n_kv_heads=n_kv_heads, head_dim=DH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def heads(seed: int = 0, n_kv_heads: int = G) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, H, T, DH, generator=generator), torch.randn(2, n_kv_heads, T, DH, generator=generator)


def rms(x: Tensor, *dims: int) -> Tensor:
    return x.double().pow(2).mean(dims, keepdim=True).sqrt()


def test_all_norms_are_tested():
    assert {*NORMS, "none"} == set(QKNorm.Config.choices)


def test_closed_forms():
    q, k = heads()
    for kind, dims in (("rms", (-1,)), ("rms_gainless", (-1,)), ("rms_full", (1, 3)), ("rms_per_head", (-1,))):
        module = norm(kind, eps=TINY)
        gains = [parameter.detach() for parameter in module.parameters()] or [torch.ones(DH)] * 2
        shapes = {"rms": (DH,), "rms_gainless": (DH,), "rms_full": (-1, 1, DH), "rms_per_head": (-1, 1, DH)}
        for x, y, gain in zip((q, k), module(q, k), gains, strict=True):
            expected = (x / rms(x, *dims) * gain.view(shapes[kind])).float()
            torch.testing.assert_close(y, expected, atol=ATOL, rtol=0, msg=lambda m, kind=kind: f"{kind}: {m}")


def test_gains():
    shapes = {
        kind: [tuple(parameter.shape) for parameter in norm(kind).parameters()] for kind in NORMS if kind != "l2_scaled"
    }
    assert shapes == {
        "rms": [(DH,), (DH,)],
        "rms_per_head": [(H, DH), (G, DH)],
        "rms_full": [(H * DH,), (G * DH,)],
        "rms_gainless": [],
    }
    assert [tuple(p.shape) for p in norm("l2_scaled").parameters()] == [(H * DH,), (G * DH,)]
    assert [tuple(p.shape) for p in norm("l2_scaled", n_kv_heads=H).parameters()] == [(H * DH,)]


def test_where_eps_stands():
    eps = 0.5
    q, k = heads()
    gain = norm("rms_per_head", eps=eps).q.detach()
    outside = q / (rms(q, -1) + eps) * gain[:, None]
    torch.testing.assert_close(norm("rms_per_head", eps=eps)(q, k)[0], outside.float(), atol=ATOL, rtol=0)
    inside = q / (rms(q, -1) ** 2 + eps).sqrt()
    torch.testing.assert_close(norm("rms_gainless", eps=eps)(q, k)[0], inside.float(), atol=ATOL, rtol=0)


@kinds
@pytest.mark.parametrize("n_kv_heads", [G, H])
def test_the_length_of_queries_and_keys_does_not_matter(kind: str, n_kv_heads: int):
    module = attention(n_heads=H, n_kv_heads=n_kv_heads, qk_norm={"type": kind, **NORMS[kind]})
    x = inputs()
    before = run(module, x)
    with torch.no_grad():
        module.q.weight.mul_(10)
        module.k.weight.mul_(0.1)
    torch.testing.assert_close(run(module, x), before, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("kind", "gains"),
    [*((kind, torch.bfloat16) for kind in NORMS), ("l2_scaled", torch.float32), ("rms_per_head", torch.float32)],
)
def test_dtype_stays(kind: str, gains: torch.dtype):
    module = norm(kind).to(gains)
    q, k = (x.bfloat16() for x in heads())
    normed_q, normed_k = module(q, k)
    assert {normed_q.dtype, normed_k.dtype, module.after_position(normed_q).dtype} == {torch.bfloat16}


@kinds
def test_gradients_of_zeros_are_finite(kind: str):
    q, k = (torch.zeros_like(x).requires_grad_() for x in heads())
    normed_q, normed_k = norm(kind)(q, k)
    (normed_q.sum() + normed_k.sum()).backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


@kinds
@pytest.mark.parametrize("n_kv_heads", [G, H])
def test_cached_keys_need_no_second_look(kind: str, n_kv_heads: int):
    model = tiny_model(attention={"n_heads": H, "n_kv_heads": n_kv_heads, "qk_norm": kind})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qk_norm" in name:
                parameter.mul_(1 + torch.rand(parameter.shape))
    tokens, cache, pieces = torch.randint(VOCAB, (2, 9)), KVCache(9), []
    for piece in tokens.split([4, 1, 3, 1], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=ATOL, rtol=0)


@pytest.mark.parametrize("n_kv_heads", [G, H])
def test_l2_scaled_is_both_scales_behind_the_rotation(n_kv_heads: int):
    module = norm("l2_scaled", n_kv_heads)
    q, k = heads(n_kv_heads=n_kv_heads)
    rope = RoPE.Config().build(n_heads=H, head_dim=DH)
    context = tiny_model().context(torch.zeros(2, T, dtype=torch.long))

    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, k, context.memory, rope.prepare(context))[:2]

    fast_q, fast_k = rotated(*module(q, k))
    fast = module.after_position(fast_q) @ fast_k.repeat_interleave(H // n_kv_heads, 1).mT
    scales = [parameter.detach() * math.sqrt(D) for parameter in module.parameters()]
    s_q, s_k = scales if len(scales) == 2 else scales * 2
    slow_q, slow_k = rotated(q, k)
    slow_q = slow_q / slow_q.norm(dim=-1, keepdim=True) * s_q.view(H, 1, DH)
    slow_k = slow_k / slow_k.norm(dim=-1, keepdim=True) * s_k.view(n_kv_heads, 1, DH)
    slow = slow_q @ slow_k.repeat_interleave(H // n_kv_heads, 1).mT
    torch.testing.assert_close(fast, slow, atol=ATOL * slow.abs().max().item(), rtol=0)


def test_one_shared_scale_steps_as_two_that_start_alike():
    q, k = heads(n_kv_heads=H)
    shared = norm("l2_scaled", H)
    (value,) = shared.parameters()
    config = QKNorm.Config.choose("l2_scaled")
    two = L2ScaledQKNorm(config, dim=D, n_heads=H, n_kv_heads=H, head_dim=DH)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.copy_(value)
    models = [shared, two]
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    for _ in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            normed_q, normed_k = model(q, k)
            (model.after_position(normed_q) @ normed_k.mT).softmax(-1).square().sum().backward()
            optimizer.step()
    for parameter in two.parameters():
        torch.testing.assert_close(parameter, value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_against_transformers(family: str):
    if family == "qwen3":
        from transformers import Qwen3Config as Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention as Reference
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding as Rotary
    else:
        from transformers import Olmo2Config as Config
        from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention as Reference
        from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding as Rotary
    kind = {"qwen3": "rms", "olmo2": "rms_full"}[family]
    eps = 1e-2
    config = Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=DH, rms_norm_eps=eps, attention_bias=False
    )
    config._attn_implementation = "sdpa"
    module = attention(n_heads=H, n_kv_heads=G, head_dim=DH, qk_norm={"type": kind, "eps": eps})
    reference = Reference(config, 0)
    state = {name.replace(".w", "_proj.w"): value for name, value in module.state_dict().items() if "norm" not in name}
    state |= {f"{name}_norm.weight": module.qk_norm.get_submodule(name).weight for name in "qk"}
    reference.load_state_dict(state)
    x = inputs()
    angles = Rotary(config)(x, torch.arange(T)[None])
    torch.testing.assert_close(run(module, x), reference(x, angles, None)[0], atol=ATOL, rtol=0)
