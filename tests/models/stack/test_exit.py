"""Stopping early in decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache, Sampling, generate, last_logits
from titan_lite.models.context import EarlyExit
from titan_lite.models.stack.recurrent.exit import Exit
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
CPU = torch.device("cpu")
MOST = 6
PROMPT = [3, 1, 4, 1, 5]
THRESHOLDS = ["kl", "entropy", "latent", "cosine", "min_p_kl"]


def recurrent(**exit: Any) -> Transformer:
    stack = {"type": "recurrent", "mean_iterations": MOST, "exit": exit}
    model = tiny_model(n_layers=4, residual="sandwich_sum", stack=stack)
    with torch.no_grad():
        model.head.output.weight.mul_(50)
        model.stack.blocks["1"].attention.o.weight.mul_(20)
        model.stack.adapter.linear.weight.mul_(5)
    return model


class Decoded:
    """Greedy tokens, and the iterations that each call ran."""

    def __init__(self, model: Transformer, n: int = 6):
        counts: list[int] = []
        model.stack.adapter.register_forward_hook(lambda *_: counts.append(1))
        self.tokens: list[int] = []
        self.iterations: list[int] = []
        for token in generate(model, PROMPT, n, Sampling(temperature=0), 0, CPU, VOCAB):
            self.tokens.append(token)
            self.iterations.append(len(counts))
            counts.clear()


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_thresholds_of_nothing_and_of_everything(kind: str):
    fixed = Decoded(recurrent(type="fixed"))
    never, always = Decoded(recurrent(type=kind, threshold=0.0)), Decoded(recurrent(type=kind, threshold=float("inf")))
    assert never.iterations == fixed.iterations == [MOST] * 6
    assert never.tokens == fixed.tokens
    assert always.iterations == [2] * 6  # the first iteration that has one to be compared with
    assert always.tokens[0] == Decoded(recurrent(type="fixed", iterations=2), 1).tokens[0]


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_a_threshold_of_zero_is_bitwise_the_most(kind: str):
    fixed, never = recurrent(type="fixed"), recurrent(type=kind, threshold=0.0)
    tokens = torch.tensor([PROMPT])
    for logits in (never(tokens, memory=KVCache(9), agree=int), never(tokens), never(tokens, memory=KVCache(9))):
        assert torch.equal(logits, fixed(tokens))


def test_argmax_stable_counts_in_a_row():
    """The prompt's likeliest token is looked at by hand, iteration by iteration."""
    model = recurrent(type="fixed", iterations=1)
    tokens = torch.tensor([PROMPT])
    likeliest = []
    for n in range(1, MOST + 1):
        model.stack.exit.iterations = n
        likeliest.append(int(model(tokens)[0, -1].argmax()))
    for steps in (1, 2, 3):
        same = [n for n in range(steps + 1, MOST) if len(set(likeliest[n - steps - 1 : n])) == 1]
        assert Decoded(recurrent(type="argmax_stable", steps=steps), 1).iterations == [same[0] if same else MOST]


@pytest.mark.parametrize("kind", ["kl", "latent"])
def test_tokens_that_stopped_stand_for_later_iterations(kind: str):
    """By hand: a cache in which the slots of iterations that a token did not run hold those of its last one."""
    model = recurrent(type=kind, threshold=float("inf"))
    cache = KVCache(8)
    model(torch.tensor([PROMPT]), memory=cache, agree=int)
    assert sorted(cache.layers) == list(range(2 + 2 * MOST))
    for later in range(2, MOST):
        for layer in range(2):
            mine, source = (cache.layers[2 + 2 * i + layer] for i in (later, 1))
            assert torch.equal(mine.k[:, :, :5], source.k[:, :, :5])
            assert torch.equal(mine.v[:, :, :5], source.v[:, :, :5])
    cache.advance(5)
    model.stack.exit.threshold = 0.0
    deep = model(torch.tensor([[9]]), memory=cache, agree=int, consume=last_logits)
    assert deep.isfinite().all()
    assert cache.layers[2 + 2 * 5].k[:, :, 5].abs().sum() > 0


def test_some_tokens_think_longer_than_others():
    """With a threshold among the differences of a text; every decision goes through `agree`."""
    model = recurrent(type="latent", threshold=0.0)
    found: list[float] = []
    original = model.stack.exit.difference
    model.stack.exit.difference = lambda before, now: found.append(float(d := original(before, now))) or d
    Decoded(model, 8)
    model.stack.exit.threshold = sorted(found)[len(found) // 2]
    decoded = Decoded(model, 8)
    assert len(set(decoded.iterations)) > 1
    asked: list[int] = []

    def agree(value: int) -> int:
        asked.append(value)
        return value

    again = list(generate(model, PROMPT, 8, Sampling(temperature=0), 0, CPU, VOCAB, agree=agree))
    assert again == decoded.tokens
    # One question an iteration, but for the last one, and one a token.
    assert len(asked) == sum(min(n, MOST - 1) for n in decoded.iterations) + 8


def difference(kind: str, before: Tensor, now: Tensor, **table: Any) -> float:
    """What an exit finds between two iterations, whose logits (or states) these are."""
    exit = Exit.Config.choose({"type": kind} | table).build(mean=2)
    early = EarlyExit(lambda logits: logits, int)
    return float(exit.difference(*(exit.seen(x, lambda x=x: x, early) for x in (before, now))))


def test_criteria_by_their_formulas():
    p, q = torch.randn(2, 1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True).item()
    assert difference("kl", p, q) == pytest.approx(kl)
    assert difference("kl", p, p) == 0
    entropies = [torch.distributions.Categorical(logits=x).entropy().item() for x in (p, q)]
    assert difference("entropy", p, q) == pytest.approx(abs(entropies[0] - entropies[1]))
    assert difference("latent", p, q) == pytest.approx(((q - p).norm() / q.norm()).item())
    assert difference("cosine", p, q) == pytest.approx(1 - (p @ q.t() / p.norm() / q.norm()).item())
    assert difference("min_p_kl", p, q, min_p=1e-9) == pytest.approx(kl)


def test_min_p_ignores_what_is_improbable():
    p = torch.tensor([[5.0, 4.0, -3.0, -4.0]])
    q = torch.tensor([[5.0, 4.0, -9.0, -4.5]])
    assert difference("kl", p, q) > 1e-5
    assert difference("min_p_kl", p, q) == 0
    assert difference("min_p_kl", p, torch.tensor([[5.0, 1.0, -3.0, -4.0]])) > 1e300
