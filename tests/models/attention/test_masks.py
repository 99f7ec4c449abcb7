"""What masks let through: windows at their ends, documents as if alone, and Mistral's window."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.models.attention.cases import COMPUTES, DH, SCORES, Case
from tests.models.test_transformer import hf_name
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.attention.mask import Mask, SlidingWindow

ATOL = 1e-5
"""fp32, up to two layers."""
RTOL = 1e-6
"""Squared scores make results of up to 60."""
T = 13

EVERY = [pytest.param(kernel, score, id=f"{kernel}-{score}") for kernel, scores in COMPUTES.items() for score in scores]

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def eager_calls():
    """FlexAttention is called at once, not through dynamo."""
    with torch.compiler.set_stance("force_eager"):
        yield


def windowed(window: int) -> list[Any]:
    return ["causal", {"type": "sliding_window", "window": window}]


def test_a_window_counts_the_query_itself() -> None:
    mask = Mask.Config.choose({"type": "sliding_window", "window": 3}).build()
    assert isinstance(mask, SlidingWindow)
    i, j = torch.arange(5)[:, None], torch.arange(5)[None, :]
    seen = mask.allowed(i, j, None, None) & (j <= i)
    assert seen.sum(1).tolist() == [1, 2, 3, 3, 3]
    assert seen[4].tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("window", [T, T + 1, 1000])
@pytest.mark.parametrize(("kernel", "score"), EVERY)
def test_a_window_as_long_as_the_row_is_none(kernel: str, score: str, window: int) -> None:
    narrow = Case(T, windowed(window), SCORES[score]).run(kernel)
    torch.testing.assert_close(narrow, Case(T, score=SCORES[score]).run(kernel), atol=ATOL, rtol=0)
    narrower = Case(T, windowed(T - 1), SCORES[score]).run(kernel)
    assert torch.equal(narrow[:, :, :-1], narrower[:, :, :-1]) or kernel == "sdpa"
    assert not torch.allclose(narrow[:, :, -1], narrower[:, :, -1], atol=1e-4)


@pytest.mark.parametrize(("kernel", "score"), [(k, s) for k, scores in COMPUTES.items() for s in scores if "soft" in s])
def test_a_window_of_one_gives_the_own_value(kernel: str, score: str) -> None:
    case = Case(T, windowed(1), SCORES[score], value_dim=DH)
    torch.testing.assert_close(case.run(kernel), case.v.repeat_interleave(2, dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", COMPUTES)
def test_hidden_keys_stay_hidden_where_all_scores_are_very_low(kernel: str) -> None:
    case = Case(T, windowed(5), scale=200.0)
    case.q, case.k = -1 - torch.rand_like(case.q), torch.rand_like(case.k)
    assert case.scores().amax(-1).max() < -200
    # Scores near 1000 have errors of 1e-4 in fp32.
    torch.testing.assert_close(case.run(kernel).double(), case.expected(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kernel", COMPUTES)
def test_how_far_a_token_reaches_through_layers(kernel: str) -> None:
    """Over 2 layers with windows of 4 to 6 tokens behind it, and no further."""
    model = tiny_model(attention={"n_heads": 4, "n_kv_heads": 2, "masks": windowed(4), "kernel": kernel})
    tokens = torch.randint(VOCAB, (1, 16))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCAB
    with torch.no_grad():
        differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero()[:, 0].tolist() == list(range(5, 5 + 2 * 3 + 1))


@pytest.mark.parametrize(("kernel", "score"), EVERY)
def test_a_packed_document_is_what_it_is_alone(kernel: str, score: str) -> None:
    packed = Case(T, ["causal", "document"], SCORES[score])
    y = packed.run(kernel)
    bounds = [0, *packed.documents[0].diff().nonzero()[:, 0].add(1).tolist(), T]
    assert len(bounds) > 2
    for start, stop in pairwise(bounds):
        alone = Case(stop - start, score=SCORES[score])
        alone.q, alone.k, alone.v = (x[:, :, start:stop] for x in packed.tensors())
        torch.testing.assert_close(y[0, :, start:stop], alone.run(kernel)[0], atol=ATOL, rtol=RTOL)


def test_against_transformers_mistral() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    attention = {"n_heads": 4, "n_kv_heads": 2, "masks": windowed(5)}
    model = tiny_model(attention=attention, norm={"eps": 1e-6})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        sliding_window=5,
        attn_implementation="eager",
    )
    reference = MistralForCausalLM(config).eval()
    reference.load_state_dict({hf_name(name): parameter for name, parameter in model.named_parameters()})
    tokens = torch.randint(VOCAB, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=ATOL, rtol=0)


def test_a_window_that_hides_nothing_is_said() -> None:
    def said(window: int) -> list[str]:
        masks = {"attention": {"masks": windowed(window), "kernel": "flex"}}
        return list(job_from_dict({"model": masks, "training": {"seq_len": 64}}, files=False).warnings)

    assert said(63) == []
    assert said(64) == ["model.attention.masks[1].window = 64 hides nothing: training.seq_len is 64"]


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_holds_at_least_the_query(window: int) -> None:
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"attention": {"masks": windowed(window)}}})
    assert [(p.code, p.key) for p in caught.value.problems] == [("E003", "model.attention.masks[1].window")]
