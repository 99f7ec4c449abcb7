"""Decoding with cached keys and values, and sampling."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache, Sampling, generate

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
    assert list(generate(model, [1], 20, Sampling(), 0, CPU, VOCAB, end=full[7])) == full[: full.index(full[7])]


def frequencies(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([sampling.draw(logits, generator) for _ in range(draws)]), minlength=len(logits)
    )
    return counts / draws


def test_sampling_frequencies():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    tolerance = 0.03  # about 4 standard errors of 4000 draws
    plain = torch.softmax(logits, -1)
    torch.testing.assert_close(frequencies(Sampling(), logits), plain, atol=tolerance, rtol=0)
    torch.testing.assert_close(
        frequencies(Sampling(temperature=2.0), logits), torch.softmax(logits / 2, -1), atol=tolerance, rtol=0
    )
    two = torch.tensor([0.0, plain[1], plain[2], 0.0])
    torch.testing.assert_close(frequencies(Sampling(top_k=2), logits), two / two.sum(), atol=tolerance, rtol=0)
    # 0.64 alone does not reach 0.7, so the second likeliest is in; at 0.5 the likeliest alone is.
    torch.testing.assert_close(frequencies(Sampling(top_p=0.7), logits), two / two.sum(), atol=tolerance, rtol=0)
    assert frequencies(Sampling(top_p=0.5), logits, 50)[1] == 1
    assert frequencies(Sampling(top_k=1), logits, 50)[1] == 1


def test_tokens_stay_within_the_tokenizer():
    model = tiny_model()
    assert max(generate(model, [1], 60, Sampling(temperature=2.0), 0, CPU, 5)) < 5


def test_a_tiny_temperature_is_greedy_and_broken_logits_are_told():
    logits = torch.tensor([0.0, 3.0, 2.999])
    assert Sampling(temperature=1e-300).draw(logits, torch.Generator()) == 1
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampling().draw(torch.tensor([0.0, float("nan")]), torch.Generator())
