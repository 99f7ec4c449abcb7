"""Decoding with cached keys and values, of one text and of many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import Engine, KVCache, Request, Sampling, decode, generate
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
CPU = torch.device("cpu")


@pytest.mark.parametrize("masks", [["causal"], ["causal", "document"]])
def test_cache_gives_the_logits_of_a_full_forward(masks: list[str]):
    model = tiny_model(attention={"n_heads": 4, "n_kv_heads": 2, "masks": masks})
    tokens = torch.randint(VOCAB, (2, 17))
    cache = KVCache(17)
    pieces = []
    for piece in tokens.split([5, 1, 3, 1, 7], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=ATOL, rtol=0)


def test_greedy_equals_repeated_full_forwards():
    model = tiny_model()
    with torch.no_grad():
        model.head.output.weight.mul_(50)
    expected = [3, 1, 4]
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(model, [3, 1, 4], 12, Sampling(temperature=0), 0, CPU, VOCAB)) == expected[3:]


def test_same_seed_same_tokens():
    model = tiny_model()
    draws = [list(generate(model, [1], 20, Sampling(temperature=1.0), seed, CPU, VOCAB)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_generation_stops_before_the_end_token():
    model = tiny_model()
    full = list(generate(model, [1], 20, Sampling(), 0, CPU, VOCAB))
    assert list(generate(model, [1], 20, Sampling(), 0, CPU, VOCAB, ends=[full[7]])) == full[: full.index(full[7])]


def test_tokens_stay_within_the_tokenizer():
    model = tiny_model()
    assert max(generate(model, [1], 60, Sampling(temperature=2.0), 0, CPU, 5)) < 5


# ---- many texts at once


PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 7, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [7, 7, 7]]
LENGTHS = [8, 3, 6, 7, 1]
WINDOW = ["causal", {"type": "sliding_window", "window": 5}]
LATENT = {"type": "mla", "n_heads": 4, "head_dim": 8, "rope_dim": 4, "kv_rank": 16}
RECURRENT = {"type": "recurrent", "prelude": 1, "coda": 0, "mean_iterations": 4}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"attention": {"n_heads": 4, "n_kv_heads": 1, "masks": WINDOW}},
    "latents": {"attention": LATENT},
    "alibi and registers": {"attention": {"n_heads": 4, "position": "alibi", "registers": {"type": "learned", "n": 2}}},
    "learned positions": {"embedding": {"position": {"type": "learned", "max_len": 40}}},
    "experts": {"ffn": {"type": "moe", "experts": {"hidden": 24}, "n_experts": 4, "top_k": 2}},
    "recurrent": {"residual": "sandwich_sum", "stack": RECURRENT},
    "moving positions": {
        "attention": {"n_heads": 4, "position": {"scaling": {"type": "dynamic_ntk", "original_max_len": 8}}}
    },
    "early exit": {
        "residual": "sandwich_sum",
        "stack": RECURRENT | {"mean_iterations": 6, "exit": {"type": "latent", "threshold": 0.5}},
    },
}


def wild(**changes: Any) -> Transformer:
    """A model whose logits are far apart, so that no choice hangs on rounding."""
    return tiny_model(init={"type": "normal", "std": 0.3}, **changes)


def together(model: Transformer, requests: list[Request], sampling: Sampling, **engine: Any) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in requests]
    for row, token in decode(Engine(model, CPU, VOCAB, **engine), requests, sampling):
        texts[row].append(token)
    return texts


@pytest.mark.parametrize("name", MODELS)
def test_each_text_is_the_one_it_is_alone(name: str):
    model, sampling = wild(**MODELS[name]), Sampling(1.5 if len(name) % 2 else 0.0, repetition_penalty=1.1)
    requests = [Request(*each, seed=3) for each in zip(PROMPTS, LENGTHS, strict=True)]
    alone = [list(generate(model, *request[:2], sampling, 3, CPU, VOCAB)) for request in requests]
    assert [len(text) for text in alone] == LENGTHS
    assert alone[2][:1] == alone[4]  # the same prompt and seed
    assert together(model, requests, sampling) == alone
    ends = frozenset({alone[0][3], alone[3][5]})
    expected = [text[: next((i for i, token in enumerate(text) if token in ends), None)] for text in alone]
    assert together(model, requests[::-1], sampling, ends=ends) == expected[::-1]


def test_seeds_are_each_text_s_own():
    model = wild()
    texts = together(model, [Request([1], 20, seed) for seed in (0, 1, 0)], Sampling())
    assert texts[0] == texts[2] != texts[1]


def test_calls_are_shared():
    """Prompts of 2 and 5 tokens, 4 and 3 new ones: 2 tokens of both are read, then one by one, at last of one row."""
    model, shapes = wild(), list[tuple[int, ...]]()
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    together(model, [Request([1, 2], 4), Request([1, 2, 3, 4, 5], 3)], Sampling(temperature=0))
    hook.remove()
    assert shapes == [(2, 2), (2, 1), (2, 1), (2, 1), (1, 1), (1, 1)]
    shapes.clear()
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    together(model, [Request([1, 2], 2), Request(list(range(9)), 2)], Sampling(temperature=0))
    hook.remove()
    assert shapes == [(2, 2), (2, 1), (1, 6), (1, 1)]


def test_a_text_is_stopped_after_any_token():
    model, told = wild(), list[tuple[int, int]]()

    def stop(row: int, token: int) -> bool:
        told.append((row, token))
        return row == 1 and sum(r == 1 for r, _ in told) == 3

    texts: list[list[int]] = [[], []]
    for row, token in decode(Engine(model, CPU, VOCAB), [Request([1], 6), Request([2, 3], 6)], Sampling(), stop):
        texts[row].append(token)
    assert [len(text) for text in texts] == [6, 3]
    assert told == [pair for pair in told if pair[1] in texts[pair[0]]]
    assert len(told) == 9
