"""The language-model head: the order of its parts, against transformers, and training them in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import DispatchedOps
from tests.models.tiny import VOCAB, tiny_model
from tests.runs import CPU, Run, tiny_job, train
from titan_lite.config.errors import ConfigError
from titan_lite.generation import KVCache, Sampling, generate, last_logits
from titan_lite.models.head import LMHead
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
DIM = 32
TOKENS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
EVERYTHING = {"bias": True, "logit_scale": "learned", "logit_cap": {"type": "tanh", "cap": 2.0}}


def random_model(**changes: Any) -> Transformer:
    """A tiny model with normally distributed parameters, so that logits are about as large as a cap of 2."""
    model = tiny_model(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def hidden(model: Transformer) -> Tensor:
    """What the head is given."""
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(TOKENS)
    return seen[0]


@pytest.mark.parametrize("tied", [False, True])
def test_bias_then_scale_then_cap(tied: bool):
    model = random_model(head=EVERYTHING | {"tied": tied})
    head = model.head
    assert isinstance(head, LMHead)
    weight, bias = (model.embedding.weight, head.bias) if tied else (head.output.weight, head.output.bias)
    s_z = head.logit_scale.s_z.value * DIM**0.5
    expected = 2.0 * torch.tanh((hidden(model) @ weight.t() + bias) * s_z / 2.0)
    assert 0.1 < expected.abs().mean() < 1.9
    torch.testing.assert_close(model(TOKENS), expected, atol=ATOL, rtol=0)


def test_a_constant_scale_multiplies_and_a_wide_cap_does_nothing():
    plain = random_model()
    scaled = random_model(
        head={"logit_scale": {"type": "constant", "value": 0.0625}, "logit_cap": {"type": "tanh", "cap": 1e5}}
    )
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS) / 16, atol=ATOL, rtol=0)


def test_cap_against_gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = random_model(head={"tied": True, "logit_cap": {"type": "tanh", "cap": 2.0}})
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    reference = Gemma2ForCausalLM(config).eval()
    reference.load_state_dict({"model.embed_tokens.weight": model.embedding.weight}, strict=False)
    x = reference.model(TOKENS).last_hidden_state
    logits = model.head(x, model.embedding, lambda x, output: output.logits(x))
    torch.testing.assert_close(logits, reference(TOKENS).logits, atol=ATOL, rtol=0)


def test_scale_against_cohere():
    from transformers import CohereConfig, CohereForCausalLM

    model = random_model(head={"tied": True, "logit_scale": {"type": "constant", "value": 0.25}})
    config = CohereConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=0.25,
    )
    reference = CohereForCausalLM(config).eval()
    reference.load_state_dict({"model.embed_tokens.weight": model.embedding.weight}, strict=False)
    x = reference.model(TOKENS).last_hidden_state
    logits = model.head(x, model.embedding, lambda x, output: output.logits(x))
    torch.testing.assert_close(logits, reference(TOKENS).logits, atol=ATOL, rtol=0)


def test_parts_start_as_nothing():
    """A bias starts at 0 and s_z at 1: the first logits are those of a head without them."""
    plain, full = tiny_model(), tiny_model(head={"bias": True, "logit_scale": "learned"})
    torch.testing.assert_close(full(TOKENS), plain(TOKENS), atol=ATOL, rtol=0)
    specs = collect_specs(full)
    added = specs.keys() - collect_specs(plain).keys()
    assert added == {"head.output.bias", "head.logit_scale.s_z.value"}
    assert {name: (specs[name].role, specs[name].start) for name in added} == {
        "head.output.bias": ("bias", 0.0),
        "head.logit_scale.s_z.value": ("scalar", DIM**-0.5),
    }


def test_what_is_off_is_no_operation():
    counts = []
    for head in ({}, {"bias": False, "logit_scale": "none", "logit_cap": "none"}):
        model = tiny_model(head=head)
        x = torch.randn(2, 3, DIM)
        counter = DispatchedOps()
        counter.start()
        model.head(x, model.embedding, lambda x, output: output.logits(x))
        counts.append(counter.stop())
    assert counts[0] == counts[1]
    assert counts[0]["aten.mm"] == 1
    assert counts[0].keys() <= {"aten.mm", "aten.t", "aten.view", "aten._unsafe_view"}


def test_decoding_sees_the_same_logits():
    model = random_model(head=EVERYTHING | {"tied": True}, embedding={"type": "low_rank", "width": 16})
    expected = model(TOKENS)
    torch.testing.assert_close(model(TOKENS, consume=last_logits), expected[:, -1:], atol=ATOL, rtol=0)
    cache = KVCache(TOKENS.shape[1])
    pieces = []
    for piece in TOKENS.split([4, 1, 6], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=ATOL, rtol=0)
    greedy = list(generate(model, TOKENS[0].tolist(), 1, Sampling(temperature=0), 0, CPU, VOCAB))
    assert greedy == [int(expected[0, -1].argmax())]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"logit_scale": {"type": "constant", "value": 0}}, "logit_scale.value"),
        ({"logit_cap": {"type": "tanh", "cap": 0.0}}, "logit_cap.cap"),
        ({"logit_scale": "constant"}, "logit_scale.value"),
    ],
)
def test_values_that_mean_nothing_are_refused(table: dict[str, Any], key: str):
    with pytest.raises(ConfigError) as caught:
        tiny_job(model={"head": table})
    assert [problem.key for problem in caught.value.problems] == [f"model.head.{key}"]


# ---- training

MODELS: dict[str, dict[str, Any]] = {
    "untied": {"head": EVERYTHING},
    "tied": {"head": EVERYTHING | {"tied": True}},
    "low rank": {
        "head": EVERYTHING | {"tied": True},
        "embedding": {"type": "low_rank", "width": 16, "norm": "rmsnorm", "scale": "sqrt_dim"},
    },
}


def sections(model: str, local_batch_size: int, chunk_tokens: int, **more: Any) -> dict[str, Any]:
    training = {
        "local_batch_size": local_batch_size,
        "global_batch_size": 8,
        "loss_chunk_tokens": chunk_tokens,
        "z_loss": 1e-2,
    }
    return {"model": MODELS[model], "training": training} | more


def assert_equal_runs(run: Run, reference: Run) -> None:
    torch.testing.assert_close(run.losses, reference.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(run.norms, reference.norms, rtol=1e-4, atol=0)
    assert run.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_chunks_ranks_and_compilation_change_nothing(pool2, model: str):
    reference = train(sections(model, 8, 0), 3)
    assert_equal_runs(train(sections(model, 4, 24), 3), reference)
    for run in pool2.run(train, sections(model, 4, 24), 3):
        assert_equal_runs(run, reference)
    compiled = {"compile": {"enable": True, "components": ["loss"], "backend": "aot_eager"}}
    assert_equal_runs(train(sections(model, 4, 24, **compiled), 3), reference)
    assert_equal_runs(train(sections(model, 8, 0, **compiled), 3), reference)


def test_the_first_step_moves_s_z_by_its_own_rate():
    """Adam moves each parameter by lr: s_z = value * sqrt(dim) by sqrt(dim) * lr."""
    run = train(
        {"model": {"head": {"logit_scale": "learned"}}, "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0}}, 1
    )
    moved = (run.weights["head.logit_scale.s_z.value"] * DIM**0.5 - 1).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, DIM**0.5 * 1e-2), rtol=1e-2, atol=0)
