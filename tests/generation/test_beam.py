"""Beam search against transformers' generate(num_beams=)."""

from __future__ import annotations

import pytest
import torch

from tests.hf.twins import VOCAB, Twins, preset_config, twins
from tests.models.tiny import tiny_model
from titan_lite.generation import BeamSearch, Engine, Sampling

CPU = torch.device("cpu")
NEW = 12
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def pair() -> Twins:
    """Logits are far apart: rounding decides nothing."""
    return twins("llama", preset_config("llama3", n_layers=2), std=0.2)


def prompts(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (3 + i,), generator=generator).tolist() for i in range(n)]


def theirs(pair: Twins, prompt: list[int], width: int, ends: list[int], **options: float) -> list[int]:
    tokens = torch.tensor([prompt])
    made = pair.theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        num_beams=width,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=VOCAB - 1,
        **options,
    )[0, len(prompt) :].tolist()
    return made[: next((i for i, token in enumerate(made) if token in ends), None)]


@pytest.mark.parametrize("penalty", [1.0, 0.0, -1.0, 3.0])
@pytest.mark.parametrize("width", [2, 5])
def test_against_transformers(pair: Twins, width: int, penalty: float) -> None:
    """With tokens that end a text at all lengths, so that results and beams compete."""
    lengths = set()
    for prompt in prompts(2):
        for ends in ([], [5], list(range(8))):
            engine = Engine(pair.ours, CPU, VOCAB, frozenset(ends))
            found = BeamSearch(width, penalty)(engine, prompt, NEW, GREEDY)
            assert found == theirs(pair, prompt, width, ends, length_penalty=penalty), (prompt, ends)
            lengths.add(len(found))
    assert len(lengths) > 1 or penalty > 1


def test_with_a_repetition_penalty(pair: Twins) -> None:
    engine = Engine(pair.ours, CPU, VOCAB, frozenset({5}))
    for prompt in prompts(2):
        found = BeamSearch(3)(engine, prompt, NEW, Sampling(temperature=0, repetition_penalty=1.5))
        assert found == theirs(pair, prompt, 3, [5], repetition_penalty=1.5)


def test_wide_enough_it_finds_the_likeliest_text_of_all() -> None:
    """Among all 8 x 8 x 8 continuations by three tokens."""
    model = tiny_model(init={"type": "normal", "std": 0.3}).double()
    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    with torch.no_grad():
        logits = model(torch.cat((torch.full((len(every), 1), 9), every[:, :2]), dim=1))[..., :8]
    p = logits.log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
    found = BeamSearch(64)(Engine(model, CPU, 8), [9], 3, GREEDY)
    assert found == every[p.argmax()].tolist()
