"""Decoding: which keys are remembered, and that it gives what a forward over the whole text gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.position.turning import ATOL, context_of, position, queries_and_keys
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache
from titan_lite.models.position import Position

DYNAMIC: list[dict[str, Any]] = [
    {"scaling": {"type": "dynamic_ntk", "factor": 2.0, "original_max_len": 6}},
    {"scaling": {"type": "lswt", "train_len": 6}},
    {"scaling": {"type": "lswt", "train_len": 6}, "direction": "reversed", "layout": "interleaved"},
    {"scaling": {"type": "lswt", "train_len": 6}, "frequencies": "learned"},
]
MOVING = [{"direction": "reversed"}, {"direction": "reversed", "frequencies": "learned", "fraction": 0.5}, *DYNAMIC]
RESTING: list[dict[str, Any]] = [
    {},
    {"frequencies": "learned", "layout": "interleaved"},
    {"scaling": {"type": "yarn", "factor": 4.0, "original_max_len": 8}},
]


def attention(form: dict[str, Any]) -> dict[str, Any]:
    return {"n_heads": 4, "n_kv_heads": 2, "position": {"type": "rope", **form}}


def changed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with frequencies as they may be after some training, and scores that tell positions apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_factor" in name:
                parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
            elif ".attention.q." in name or ".attention.k." in name:
                parameter.mul_(20)
    return model


@pytest.mark.parametrize("form", MOVING + RESTING, ids=str)
def test_pieces_with_a_cache_equal_the_text_so_far(form: dict[str, Any]):
    """With scaling that depends on the length, in one layer: the keys of a second one come from shorter texts."""
    model = changed(tiny_model(attention=attention(form), n_layers=1 if form in DYNAMIC else 2))
    tokens = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    cache = KVCache(17)
    for piece in tokens.split([5, 1, 3, 1, 7], dim=1):
        logits = model(piece, memory=cache)
        cache.advance(piece.shape[1])
        torch.testing.assert_close(logits, model(tokens[:, : cache.length])[:, -piece.shape[1] :], atol=ATOL, rtol=0)


@pytest.mark.parametrize("form", DYNAMIC, ids=str)
def test_length_matters_beyond_that_of_the_training(form: dict[str, Any]):
    model = changed(tiny_model(attention=attention(form), n_layers=1))
    tokens = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    short, long = (model(tokens[:, :n]) for n in (5, 6))
    torch.testing.assert_close(long[:, :5], short, atol=ATOL, rtol=0)
    assert not torch.allclose(whole[:, :6], long, atol=1e-4)


def remembered(module: Position, pieces: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What is in the cache after the pieces of a text, and the keys that came back last."""
    q, k = queries_and_keys(length=sum(pieces))
    cache = KVCache(sum(pieces))
    for q_piece, k_piece in zip(q.split(pieces, dim=2), k.split(pieces, dim=2), strict=True):
        prepared = module.prepare(context_of(cache, q_piece.shape[2]))
        _, keys, values = module(q_piece, k_piece, k_piece, cache.layer(0), prepared)
        cache.advance(q_piece.shape[2])
    assert torch.equal(values, k)
    return cache.layer(0).k, keys


@pytest.mark.parametrize("form", MOVING, ids=str)
def test_keys_that_move_are_remembered_as_they_are(form: dict[str, Any]):
    kept, returned = remembered(position(**form), [5, 1, 6])
    assert torch.equal(kept, queries_and_keys(length=12)[1])
    assert torch.equal(returned, remembered(position(**form), [12])[1])


@pytest.mark.parametrize("form", RESTING, ids=str)
def test_keys_that_rest_are_turned_once(form: dict[str, Any]):
    kept, returned = remembered(position(**form), [5, 1, 6])
    assert torch.equal(kept, returned)
    assert torch.equal(kept, remembered(position(**form), [12])[1])
    assert not torch.allclose(kept, queries_and_keys(length=12)[1], atol=0.1)
