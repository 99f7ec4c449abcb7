"""Caps, and weights that are no softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.attention.cases import COMPUTES, DH, MASKS, SCORES, B, Case, G, H, Slope
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.attention.score import Score

ATOL = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def weights(case: Case) -> Tensor:
    """(B, H, T, T) of the eager kernel: what comes out where values are unit vectors."""
    case.v = torch.eye(case.n_tokens).expand(B, G, -1, -1)
    return case.run("eager")


def capped(cap: float) -> dict[str, Any]:
    return {"type": "softmax_capped", "cap": cap}


@pytest.mark.parametrize("kernel", [name for name, scores in COMPUTES.items() if "capped" in scores])
def test_an_infinite_cap_is_none(kernel: str) -> None:
    loose, none, tight = (Case(score=score).run(kernel) for score in (capped(1e4), "softmax", capped(0.5)))
    torch.testing.assert_close(loose, none, atol=ATOL, rtol=0)
    assert not torch.allclose(tight, none, atol=1e-2)


def test_a_tight_cap_is_the_mean() -> None:
    case = Case(score=capped(1e-4))
    mean = case.v.repeat_interleave(H // G, dim=1).cumsum(2) / torch.arange(1, case.n_tokens + 1)[:, None]
    torch.testing.assert_close(case.run("eager"), mean, atol=1e-3, rtol=0)


def test_the_bias_is_not_capped() -> None:
    """Otherwise ALiBi would not tell far keys from very far ones."""
    case = Case(40, score=capped(0.5), bias=Slope())
    scores = weights(case).log()
    assert (scores[:, -1, -1, 20] - scores[:, -1, -1, 0] > 20 * 0.5 - 1).all()  # slope 1/2, cap 1/2 either way


def test_caps_against_transformers_gemma2() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    case = Case(score=capped(1.5), value_dim=DH)
    module = nn.Module().eval()
    module.num_key_value_groups = H // G
    mask = torch.full((case.n_tokens, case.n_tokens), float("-inf")).triu(1)[None, None]
    expected, _ = eager_attention_forward(module, *case.tensors(), mask, scaling=case.scale, softcap=1.5)
    torch.testing.assert_close(case.run("eager"), expected.transpose(1, 2), atol=ATOL, rtol=0)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("score", ["relu_squared", "elu"])
def test_rows_of_normalised_weights_add_up_to_one(score: str, masks: str) -> None:
    case = Case(40, MASKS[masks], {"type": score, "normalize": True})
    found = weights(case)
    assert (found >= 0).all()
    sums = found.sum(-1)
    some = (case.scores() > 0.1).any(-1)  # where no score is positive, relu leaves nothing to divide
    assert some.float().mean() > 0.8
    torch.testing.assert_close(sums[some], torch.ones_like(sums)[some], atol=1e-3, rtol=0)
    if score == "elu":
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_closed_forms(normalize: bool) -> None:
    """Of one query that sees three keys with scores 2, 0 and -1."""
    scores = torch.tensor([[2.0, 0.0, -1.0, float("-inf")]])
    allowed = torch.tensor([[True, True, True, False]])

    def row(name: str) -> list[float]:
        score = Score.Config.choose({"type": name, "normalize": normalize}).build()
        return score.weights(scores, allowed)[0].tolist()

    e = torch.e**-1
    assert row("relu_squared") == pytest.approx([1, 0, 0, 0] if normalize else [4 / 3, 0, 0, 0], abs=1e-6)
    assert row("elu") == pytest.approx([x / (4 + e if normalize else 3) for x in (3, 1, e, 0)], abs=1e-6)


def test_unnormalised_weights_do_not_know_what_comes_later() -> None:
    """The first ten tokens of a row get the same however long the row is, which division by its length would change."""
    for score in ("relu_squared", "elu"):
        long = Case(20, score=score)
        short = Case(10, score=score)
        short.q, short.k, short.v = (x[:, :, :10] for x in long.tensors())
        torch.testing.assert_close(long.run("eager")[:, :, :10], short.run("eager"), atol=ATOL, rtol=0)


@pytest.mark.parametrize("score", [name for name in SCORES if "elu" in name])
def test_a_query_without_a_positive_score(score: str) -> None:
    """Finite weights and gradients: nothing for relu, small weights for elu."""
    case = Case(score=SCORES[score], scale=50.0)
    case.q, case.k = -torch.rand_like(case.q), torch.rand_like(case.k)
    case.q.requires_grad_()
    y = case.run("eager")
    y.sum().backward()
    assert y.isfinite().all()
    assert case.q.grad.isfinite().all()
    if "relu" in score:
        assert not y.any()


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_caps_are_positive_numbers(cap: float) -> None:
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"attention": {"score": capped(cap), "kernel": "eager"}}})
    assert [(p.code, p.key) for p in caught.value.problems] == [("E003", "model.attention.score.cap")]
