"""Rotary positions: invariances, how its forms relate, and three other implementations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.position.turning import ATOL, context, position, queries_and_keys, scores, turned
from tests.models.tiny import VOCAB, tiny_model

FORMS: list[dict[str, Any]] = [
    {},
    {"layout": "interleaved"},
    {"direction": "reversed"},
    {"fraction": 0.5},
    {"frequencies": "learned"},
    {"layout": "interleaved", "direction": "reversed", "fraction": 0.25, "frequencies": "learned"},
    {"scaling": {"type": "llama3", "factor": 8.0, "original_max_len": 64}, "layout": "interleaved"},
]


def attention(*position_tables: dict[str, Any], **more: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"type": "rope"}
    for position_table in position_tables:
        table |= position_table
    return {"n_heads": 4, "n_kv_heads": 2, "position": table} | more


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_norms_stay_and_the_first_token_of_a_text_is_not_turned(form: dict[str, Any]):
    q, k = queries_and_keys()
    for before, after in zip((q, k), turned(position(**form), q, k), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), atol=ATOL, rtol=0)
        still = -1 if form.get("direction") == "reversed" else 0
        torch.testing.assert_close(after[:, :, still], before[:, :, still], atol=1e-7, rtol=0)
        assert not torch.allclose(after[:, :, 5], before[:, :, 5], atol=0.1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scores_depend_on_distances_alone(form: dict[str, Any]):
    """theta = 4^(d/2) makes all frequencies powers of 1/4, with which angles are exact in float32."""
    width = int(16 * form.get("fraction", 1))
    module = position(**form | {"theta": 4.0 ** (width / 2)})
    q, k = queries_and_keys()
    if "scaling" not in form:
        torch.testing.assert_close(scores(module, q, k, start=12345), scores(module, q, k), atol=ATOL, rtol=0)
    same = torch.ones_like(q) * q[:, :, :1], torch.ones_like(k) * k[:, :, :1]
    grid = scores(module, *same)
    torch.testing.assert_close(grid[..., 1:, 1:], grid[..., :-1, :-1], atol=ATOL, rtol=0)
    assert grid[0, 0, 5].std() > 0.1


def test_float32_angles_keep_distances_up_to_their_rounding():
    """An angle of up to 12357 has an error of 12357 * 2^-24 for its frequency and as much for the product."""
    q, k = queries_and_keys()
    tolerance = 4 * 12357 * 2**-24 * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    torch.testing.assert_close(scores(position(), q, k, start=12345), scores(position(), q, k), atol=tolerance, rtol=0)
    assert tolerance < 0.2


def rows(permutation: Tensor, n: int) -> Tensor:
    """Row numbers of a matrix of n heads, each permuted."""
    return (torch.arange(n)[:, None] * len(permutation) + permutation).flatten()


def with_permuted_heads(permutation: Tensor, **changes: Any) -> torch.nn.Module:
    """The tiny model with the rows of its query and key matrices permuted within each head."""
    model = random_model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for matrix, n in ((".attention.q.", 4), (".attention.k.", 2)):
                if matrix in name:
                    parameter.copy_(parameter[rows(permutation, n)])
    return model


def random_model(**changes: Any) -> torch.nn.Module:
    model = tiny_model(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


TOKENS = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(2))
BIASED: dict[str, Any] = {"bias": ["q", "k"]}


@pytest.mark.parametrize("form", [{}, {"direction": "reversed"}], ids=str)
def test_layouts_differ_by_a_permutation_of_the_rows(form: dict[str, Any]):
    half_split = random_model(attention=attention(form, **BIASED))
    interleaved = {"attention": attention(form, {"layout": "interleaved"}, **BIASED)}
    pairs = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 2 6 3 7
    converted = with_permuted_heads(pairs, **interleaved)
    torch.testing.assert_close(converted(TOKENS), half_split(TOKENS), atol=ATOL, rtol=0)
    assert not torch.allclose(random_model(**interleaved)(TOKENS), half_split(TOKENS), atol=1e-2)


def test_reversed_is_forward_with_swapped_halves():
    backwards = random_model(attention=attention({"direction": "reversed"}, **BIASED))
    swapped = with_permuted_heads(torch.arange(8).roll(4), attention=attention(**BIASED))
    torch.testing.assert_close(swapped(TOKENS), backwards(TOKENS), atol=ATOL, rtol=0)
    assert not torch.allclose(random_model(attention=attention(**BIASED))(TOKENS), backwards(TOKENS), atol=1e-2)


@pytest.mark.parametrize("form", [{}, {"layout": "interleaved", "fraction": 0.5}], ids=str)
def test_reversed_is_a_negated_angle(form: dict[str, Any]):
    q, k = queries_and_keys()
    forward = position(**form)
    cos, sin = forward.prepare(context(12))
    negated = forward.rotate(q, cos, -sin) @ forward.rotate(k, cos, -sin).transpose(-1, -2)
    torch.testing.assert_close(scores(position(**form, direction="reversed"), q, k), negated, atol=ATOL, rtol=0)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_numbers_outside_the_fraction_know_no_position(layout: str):
    q, k = queries_and_keys()
    for before, after in zip((q, k), turned(position(fraction=0.25, layout=layout), q, k), strict=True):
        assert torch.equal(after[..., 4:], before[..., 4:])
    narrow = turned(position(head_dim=4, layout=layout), q[..., :4], k[..., :4])
    assert torch.equal(turned(position(fraction=0.25, layout=layout), q, k)[0][..., :4], narrow[0])


@pytest.mark.parametrize(
    ("name", "family", "fraction"),
    [("Llama", "llama", 1.0), ("GPTNeoX", "gpt_neox", 0.25), ("StableLm", "stablelm", 0.5)],
)
def test_half_split_against_transformers(name: str, family: str, fraction: float):
    configuration = import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": fraction}
    config = getattr(configuration, f"{name}Config")(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    q, k = queries_and_keys(length=50)
    cos, sin = getattr(modeling, f"{name}RotaryEmbedding")(config)(q, torch.arange(50)[None])
    width = cos.shape[-1]
    assert width == 16 * fraction
    theirs = modeling.apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
    ours = turned(position(fraction=fraction, theta=5000.0), q, k)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[..., :width], other, atol=ATOL, rtol=0)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_interleaved_against_rotary_embedding_torch(fraction: float):
    from rotary_embedding_torch import RotaryEmbedding

    reference = RotaryEmbedding(dim=int(16 * fraction), theta=5000)
    q, k = queries_and_keys(length=50)
    ours = turned(position(layout="interleaved", fraction=fraction, theta=5000.0), q, k)
    for mine, before in zip(ours, (q, k), strict=True):
        torch.testing.assert_close(mine, reference.rotate_queries_or_keys(before), atol=ATOL, rtol=0)


def test_bfloat16_is_turned_in_float32():
    q, k = queries_and_keys()
    module = position(layout="interleaved", fraction=0.5)
    for short, precise in zip(
        turned(module, q.bfloat16(), k.bfloat16(), 5000),
        turned(module, q.bfloat16().float(), k.bfloat16().float(), 5000),
        strict=True,
    ):
        assert torch.equal(short, precise.bfloat16())


def test_layers_share_what_is_prepared_only_where_their_settings_are_equal():
    keys = {position(**form).key for form in FORMS} | {position(head_dim=8).key, position(theta=5000.0).key}
    assert len(keys) == len(FORMS) + 2
    assert position(layout="half_split").key == position().key
