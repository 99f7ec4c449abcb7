"""Latent attention: against transformers, and all its forms against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.attention.alone import D, T, inputs, run
from tests.models.attention.alone import attention as alone
from tests.models.memory.streams import lanes, sharp_model, stream, tokens
from tests.models.tiny import tiny_config, tiny_model
from tests.runs import tiny_job
from titan_lite.config.errors import ConfigError
from titan_lite.generation import KVCache
from titan_lite.models.attention import MLA
from titan_lite.models.attention.mla import Absorbed
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
R, DN, DR, DV, H = 16, 8, 4, 6, 4
SIZES: dict[str, Any] = {"type": "mla", "n_heads": H, "kv_rank": R, "head_dim": DN, "rope_dim": DR, "value_dim": DV}
YARN = {"type": "yarn", "factor": 4.0, "original_max_len": 8, "mscale": 0.7, "mscale_all_dim": 1.3}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compressed queries": {"q_rank": 12, "bias": ["q", "kv", "o"]},
    "eager": {"kernel": "eager", "position": {"layout": "interleaved", "scaling": YARN}},
    "learned frequencies": {"position": {"frequencies": "learned", "fraction": 0.5}},
    "counting down": {"position": {"direction": "reversed"}},
    "alibi": {"position": "alibi"},
    "no positions": {"position": "none", "latent_norm": "none"},
    "window": {"masks": ["causal", {"type": "sliding_window", "window": 5}], "latent_norm": "layernorm"},
    "capped": {"kernel": "eager", "score": {"type": "softmax_capped", "cap": 0.5}},
    "elu": {"kernel": "eager", "score": {"type": "elu", "normalize": True}},
    "sink and gate": {"kernel": "eager", "sink": "logit", "gate": "element"},
    "registers": {"registers": {"type": "learned", "n": 3}, "gate": "head"},
    "flash_attn's sizes": {"value_dim": DN + DR},
}


def latent(**table: Any) -> MLA:
    module = alone(**SIZES | table)
    assert isinstance(module, MLA)
    return module


def tables(n_layers: int = 2, **attention: Any) -> dict[str, Any]:
    return {"n_layers": n_layers, "attention": SIZES | attention}


@pytest.mark.parametrize("q_rank", [0, 12])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("scaling", ["none", YARN])
def test_against_transformers(q_rank: int, interleaved: bool, scaling: Any) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    stretched |= {"mscale": 0.7, "mscale_all_dim": 1.3}
    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=q_rank or None,
        kv_lora_rank=R,
        qk_nope_head_dim=DN,
        qk_rope_head_dim=DR,
        v_head_dim=DV,
        rope_interleave=interleaved,
        attention_bias=True,
        max_position_embeddings=32,
        rope_parameters={"rope_theta": 100.0} | ({"rope_type": "default"} if scaling == "none" else stretched),
    )
    config._attn_implementation = "eager"
    position = {"theta": 100.0, "layout": "interleaved" if interleaved else "half_split", "scaling": scaling}
    module = latent(q_rank=q_rank, bias=["q"] * bool(q_rank) + ["kv", "o"], position=position)
    reference = DeepseekV3Attention(config, 0)
    names = {
        "q.down": "q_a_proj",
        "q.norm": "q_a_layernorm",
        "q.up": "q_b_proj",
        "q": "q_proj",
        "kv.down": "kv_a_proj_with_mqa",
        "kv.norm": "kv_a_layernorm",
        "kv.up": "kv_b_proj",
        "o": "o_proj",
    }

    def their_name(name: str) -> str:
        place, _, kind = name.rpartition(".")
        return f"{names[place]}.{kind}"

    reference.load_state_dict({their_name(name): value for name, value in module.state_dict().items()})
    x, other, upstream = inputs().requires_grad_(), inputs().requires_grad_(), inputs(2)
    angles = DeepseekV3RotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), float("-inf")).triu(1)
    out, expected = run(module, x), reference(other, angles, mask)[0]
    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=ATOL, rtol=0)
    theirs = dict(reference.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[their_name(name)].grad, atol=10 * ATOL, rtol=0, msg=name)


class Count:
    """Forwards of a kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0
        plain = Absorbed._scores

        def counted(*args: Any) -> Tensor:
            self.calls += 1
            return plain(*args)

        monkeypatch.setattr(Absorbed, "_scores", counted)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_decoding_equals_the_whole_text(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens, and many at once, by keys of heads; single ones and a few by latents."""
    count = Count(monkeypatch)
    model, text = sharp_model(**tables(**FORMS[form])), tokens(40)
    whole = model(text)
    assert whole.std() > 0.05
    assert count.calls == 0
    cache, before = KVCache(40), 0
    for start, stop, absorbed in ((0, 6, 0), (6, 7, 1), (7, 8, 1), (8, 10, 1), (10, 36, 0), (36, 40, 1)):
        logits = model(text[:, start:stop], memory=cache)
        cache.advance(stop - start)
        torch.testing.assert_close(logits, whole[:, start:stop], atol=ATOL, rtol=0)
        assert count.calls - before == 2 * absorbed
        before = count.calls


@torch.no_grad()
def test_decoding_with_the_matrices_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    count = Count(monkeypatch)
    model, text = tiny_model(**tables(), stack={"type": "shared", "scope": "attention"}), tokens(8)
    cache = KVCache(8)
    for start, stop in ((0, 6), (6, 8)):
        logits = model(text[:, start:stop], memory=cache)
        cache.advance(stop - start)
        torch.testing.assert_close(logits, model(text)[:, start:stop], atol=ATOL, rtol=0)
    assert count.calls == 2


@torch.no_grad()
def test_a_narrow_latent_does_not_change_the_first_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take fewer FLOPs there as well, but the kernel that the config chose is for the whole text."""
    count = Count(monkeypatch)
    model, text = sharp_model(**tables(kv_rank=4)), tokens(12)
    cache = KVCache(12)
    whole = model(text, memory=cache)
    assert count.calls == 0
    cache = KVCache(12)
    model(text[:, :2], memory=cache)
    cache.advance(2)
    torch.testing.assert_close(model(text[:, 2:], memory=cache), whole[:, 2:], atol=ATOL, rtol=0)
    assert count.calls == 2


@torch.no_grad()
def test_a_cache_holds_the_latent_and_one_key() -> None:
    model = tiny_model(**tables(position={"frequencies": "learned"}))
    cache = KVCache(9)
    model(tokens(9), memory=cache)
    config = tiny_config(**tables())
    kept = config.attention.kept(config.dim)
    assert kept == ((1, DR), (1, R))
    for layer in cache.layers.values():
        assert layer.k.shape == (2, 1, 9, DR)
        assert layer.v.shape == (2, 1, 9, R)
        # They are normalised, and the same for all heads.
        torch.testing.assert_close(layer.v.square().mean(-1), torch.ones(2, 1, 9), atol=1e-2, rtol=0)
    deepseek = MLA.Config(kv_rank=512, rope_dim=64, head_dim=128, n_heads=128).kept(7168)
    assert sum(heads * width for heads, width in deepseek) == 576


@pytest.mark.parametrize("recompute_kv", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_segments_with_a_memory_equal_the_whole_text(
    form: str, recompute_kv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, by keys of heads, and where no gradient is wanted."""
    count = Count(monkeypatch)
    table = FORMS[form]
    if "registers" in table:
        table = table | {"position": "none"}  # they are not turned, and positions are given out anew
    changes = tables(**table)
    model, text = sharp_model(**changes), tokens(24)
    length = 4 if "masks" in table else 24
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            pieces = stream(model, lanes(length, changes, recompute_kv=recompute_kv), list(text.split(8, dim=1)))
            torch.testing.assert_close(torch.cat(list(pieces), dim=1), model(text), atol=ATOL, rtol=0)
        assert (count.calls > 0) == (length == 24 and not gradients)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_see_nothing_behind_them(form: str) -> None:
    module, x = latent(**FORMS[form]), inputs()
    changed = x.clone()
    changed[:, 7] += 1
    before, after = run(module, x), run(module, changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert not torch.isclose(before[:, 7:10], after[:, 7:10]).all(-1).any()


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns(form: str) -> None:
    module = latent(**FORMS[form])
    (run(module, inputs()) * inputs(2)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_masks_of_documents() -> None:
    model = tiny_model(**tables(masks=["causal", "document"]))
    text = tokens(16)
    documents = (torch.arange(16) >= 7).int().expand(2, -1)
    changed = text.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 64
    before, after = model(text, documents), model(changed, documents)
    assert torch.equal(before[:, 7:], after[:, 7:])
    torch.testing.assert_close(before[:, 7:], model(text[:, 7:]), atol=ATOL, rtol=0)


def test_factor_of_the_scores() -> None:
    """DeepSeek-V3's, whose context grew by 40 (arXiv 2412.19437, section 4.3)."""
    table = {"kv_rank": 512, "rope_dim": 64, "head_dim": 128}
    scaling = {"type": "yarn", "factor": 40.0, "original_max_len": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}

    def factor(**changes: Any) -> float:
        return MLA.Config.model_validate(table | changes).score_scale(192)

    assert factor(position={"type": "rope", "scaling": scaling}) == pytest.approx(0.1352337788608801, rel=1e-12)
    assert factor() == factor(position="alibi") == pytest.approx(192**-0.5, rel=1e-12)
    assert factor(scale=0.25, position={"type": "rope", "scaling": scaling}) == 0.25


def test_flops_and_roles() -> None:
    config = tiny_config(**tables(n_layers=1, q_rank=12))
    with torch.device("meta"):
        model = config.build(vocab_size=64)
    specs = collect_specs(model)
    attention = {name.removeprefix("stack.blocks.0.attention."): spec for name, spec in specs.items()}
    matrices = {"q.down": 32 * 12, "q.up": 12 * H * (DN + DR), "kv.down": 32 * (R + DR), "kv.up": R * H * (DN + DV)}
    matrices["o"] = H * DV * 32
    for name in matrices:
        assert (attention[f"{name}.weight"].role, attention[f"{name}.weight"].start) == (
            "hidden",
            "residual" if name == "o" else "weight",
        )
    assert attention["kv.norm.weight"].role == attention["q.norm.weight"].role == "norm"
    scores = 2 * H * (DN + DR + DV) * 10
    others = 3 * 32 * 48 + 64 * 32
    assert training_flops_per_token(model, specs, 10) == 3 * (2 * (sum(matrices.values()) + others) + scores)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "odd width": ({"rope_dim": 5}, ["rope_dim"]),
    "flash_attn's values": ({"kernel": "flash_attn"}, ["value_dim"]),
    "flash_attn's width": ({"kernel": "flash_attn", "head_dim": 256, "value_dim": 260}, ["head_dim"]),
    "heads": ({"n_heads": 5, "head_dim": 0}, ["n_heads"]),
    "kernel": ({"score": "elu", "kernel": "sdpa"}, ["score.type"]),
    "causal": ({"masks": ["document"]}, ["masks"]),
    "norm of keys": ({"qk_norm": "rms"}, ["qk_norm"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    table, keys = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        tiny_job(model={"attention": SIZES | table})
    found = [p.key.removeprefix("model.attention.") for p in error.value.problems]
    assert [key for key in found if key != "kernel.type"] == keys  # which this machine may lack


def test_ngpt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'model\.attention\.type = "mla"'):
        tiny_job(model={"attention": SIZES, "residual": "ngpt"}, optimizer={"weight_decay": 0.0})
