"""Absolute positions: their values, their cached decoding, and what happens where they end."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_model
from tests.runs import CPU, tiny_job, train
from titan_lite.config.errors import ConfigError
from titan_lite.generation import KVCache, Sampling, generate
from titan_lite.models.embedding.position import sinusoids
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World
from titan_lite.run.sample import log_samples
from titan_lite.step import build

ATOL = 1e-5
LEARNED = {"type": "learned", "max_len": 24}
TRAINABLE = {"type": "sinusoidal", "trainable": True, "max_len": 24}
NO_ROTATION = {"n_heads": 4, "n_kv_heads": 2, "position": "none"}


def absolute(position: Any) -> dict[str, Any]:
    """Changes to a tiny model that make absolute positions its only ones."""
    return {"embedding": {"position": position}, "attention": NO_ROTATION}


def test_sinusoids_against_transformers():
    from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings

    table = torch.empty(1000, 32)
    create_sinusoidal_embeddings(1000, 32, table)
    torch.testing.assert_close(sinusoids(torch.arange(1000), 32), table, atol=1e-4, rtol=0)
    torch.testing.assert_close(sinusoids(torch.arange(20), 32), table[:20], atol=ATOL, rtol=0)


def test_sinusoids_of_an_odd_width_end_with_a_sine():
    expected = torch.sin(torch.arange(9) * 10000 ** (-6 / 7))
    torch.testing.assert_close(sinusoids(torch.arange(9), 7)[:, -1], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("position", [LEARNED, "sinusoidal", TRAINABLE])
def test_they_tell_order(position: Any):
    """With neither positions nor a second layer, the last token does not know in which order others came before it."""
    one, other = torch.tensor([[5, 9, 3, 7]]), torch.tensor([[9, 5, 3, 7]])
    for place, knows in (("none", False), (position, True)):
        model = tiny_model(n_layers=1, **absolute(place))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        difference = (model(one)[0, -1] - model(other)[0, -1]).abs().max()
        assert (difference > 100 * ATOL) == knows
        assert (difference < ATOL) != knows


@pytest.mark.parametrize("position", [LEARNED, "sinusoidal", TRAINABLE])
def test_cache_gives_the_logits_of_a_full_forward(position: Any):
    model = tiny_model(**absolute(position))
    tokens = torch.randint(VOCAB, (2, 17))
    cache = KVCache(17)
    pieces = []
    for piece in tokens.split([5, 1, 3, 1, 7], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=ATOL, rtol=0)


def test_a_trainable_sinusoid_starts_as_one_and_learns():
    fixed = tiny_model(**absolute("sinusoidal"))
    trained = tiny_model(**absolute(TRAINABLE))
    assert not trained.embedding.position.weight.any()
    tokens = torch.randint(VOCAB, (2, 17))
    torch.testing.assert_close(trained(tokens), fixed(tokens), atol=ATOL, rtol=0)
    trained(tokens).square().sum().backward()
    grad = trained.embedding.position.weight.grad
    assert grad[:17].any(dim=1).all()
    assert not grad[17:].any()


@pytest.mark.parametrize("position", [LEARNED, TRAINABLE])
def test_ranks_change_nothing(pool2, position: Any):
    sections = {"model": absolute(position), "training": {"local_batch_size": 4, "global_batch_size": 8}}
    reference = train(sections, 3)
    for run in pool2.run(train, sections, 3):
        torch.testing.assert_close(run.losses, reference.losses, rtol=1e-5, atol=0)
        name = "embedding.position.weight"
        torch.testing.assert_close(run.weights[name], reference.weights[name], rtol=0, atol=1e-4)


# ---- where a table ends


@pytest.mark.parametrize("position", [LEARNED, TRAINABLE])
def test_generation_ends_with_the_table(position: Any):
    model = tiny_model(**absolute(position))
    prompt = [1] * 20
    # The last of the tokens is not read again: 20 + 5 of them need 24 positions.
    assert len(list(generate(model, prompt, 5, Sampling(), 0, CPU, VOCAB))) == 5
    with pytest.raises(ConfigError, match=r"model\.embedding\.position\.max_len = 24[\s\S]*24 tokens.*25 or more"):
        list(generate(model, prompt, 6, Sampling(), 0, CPU, VOCAB))
    with pytest.raises(ConfigError, match="max_len"):
        model(torch.zeros(1, 25, dtype=torch.int64))


def test_a_sample_that_is_too_long_does_not_end_a_run_badly(caplog: pytest.LogCaptureFixture):
    job = tiny_job(
        model=absolute({"type": "learned", "max_len": 16}),
        generation={"prompts": ["twelve bytes"], "max_new_tokens": 16},
    )
    training = build(job, World(0, 1, CPU), Precision.of(job, CPU), 256)
    with caplog.at_level(logging.ERROR):
        log_samples(training, job.tokenizer.build(), None, job.generation)
    assert "No sample: E013" in caplog.text
    assert "max_len" in caplog.text


@pytest.mark.parametrize("position", [LEARNED, TRAINABLE])
@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"seq_len": 32}}, "training.seq_len is 32"),
        ({"validation": {"enable": True, "seq_len": 25}}, "validation.seq_len is 25"),
        ({"generation": {"prompts": ["a"], "max_new_tokens": 30}}, "generation.max_new_tokens is 30"),
    ],
)
def test_a_table_that_is_too_short_is_refused(position: Any, sections: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=rf"E005  model\.embedding\.position\.max_len = 24\n.*{re.escape(key)}"):
        tiny_job(**{"model": absolute(position)} | sections)
    tiny_job(model=absolute("sinusoidal"), **sections)


def test_max_len_of_a_sinusoid_belongs_to_training_it():
    with pytest.raises(ConfigError, match="has no effect with trainable = false"):
        tiny_job(model=absolute({"type": "sinusoidal", "max_len": 64}))
    with pytest.raises(ConfigError, match="must be given with trainable = true"):
        tiny_job(model=absolute({"type": "sinusoidal", "trainable": True}))
