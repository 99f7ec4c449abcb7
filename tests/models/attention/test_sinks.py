"""A sink logit against a column of its own in the softmax, and against gpt-oss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.attention.cases import MASKS, Case, G, H, Slope
from tests.models.tiny import tiny_model
from titan_lite.models.attention.sink import LogitSink
from titan_lite.models.spec import collect_specs

ATOL = 1e-5
GRADIENT_ATOL = 2e-5
"""Sums over all tokens and rows."""
KERNELS = ("eager", "flex")
LOGITS = (-3.0, 0.0, 0.5, 4.0)
"""One for each head."""

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def trainable_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets FlexAttention's backward run on a CPU (test only)."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def sink(logits: tuple[float, ...] = LOGITS) -> LogitSink:
    module = LogitSink(LogitSink.Config(), n_heads=H)
    module.logit.data.copy_(torch.tensor(logits))
    return module


def with_column(case: Case, logits: Tensor) -> Tensor:
    """softmax([scores; logit]) without its last column, times the values: (B, H, T, Dv) in float64."""
    scores = case.scores()
    column = logits.double()[:, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    return weights @ case.v.double().repeat_interleave(H // G, dim=1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("choices", [{}, {"score": "softmax_capped", "masks": MASKS["window and document"]}], ids=str)
def test_against_an_explicit_column(kernel: str, choices: dict[str, Any]) -> None:
    case, module = Case(bias=Slope(), **choices), sink()
    for tensor in case.tensors():
        tensor.requires_grad_()
    attend = case.kernel(kernel)
    ours = module(attend, *case.tensors(), case.context(attend))
    theirs = with_column(case, module.logit)
    torch.testing.assert_close(ours.double(), theirs, atol=ATOL, rtol=0)
    leaves = (*case.tensors(), module.logit)
    for mine, expected in zip(
        torch.autograd.grad(ours.sin().sum(), leaves), torch.autograd.grad(theirs.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=GRADIENT_ATOL, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_log_sum_exp(kernel: str) -> None:
    case = Case(masks=MASKS["window and document"], bias=Slope())
    attend = case.kernel(kernel)
    y, lse = attend.with_lse(*case.tensors(), case.context(attend))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), case.scores().logsumexp(-1), atol=ATOL, rtol=0)
    torch.testing.assert_close(y.double(), case.expected(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_against_transformers_gpt_oss(kernel: str) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    case, module = Case(), sink()
    theirs = nn.Module().eval()
    theirs.num_key_value_groups, theirs.sinks = H // G, module.logit
    mask = torch.full((case.n_tokens, case.n_tokens), float("-inf")).triu(1)
    expected, _ = eager_attention_forward(theirs, *case.tensors(), mask, scaling=case.scale)
    attend = case.kernel(kernel)
    ours = module(attend, *case.tensors(), case.context(attend))
    torch.testing.assert_close(ours, expected.transpose(1, 2), atol=ATOL, rtol=0)


def test_limits() -> None:
    case = Case()
    attend = case.kernel("eager")
    nothing, everything = (
        sink((logit,) * H)(attend, *case.tensors(), case.context(attend)) for logit in (-100.0, 100.0)
    )
    assert torch.equal(nothing, case.run("eager"))
    assert not everything.abs().gt(1e-30).any()


def test_logits_are_scalars_that_start_at_zero() -> None:
    model = tiny_model(attention={"n_heads": 4, "n_kv_heads": 2, "sink": "logit", "kernel": "eager"})
    specs = {name: spec for name, spec in collect_specs(model).items() if "sink" in name}
    assert list(specs) == [f"stack.blocks.{layer}.attention.sink.logit" for layer in range(2)]
    for name, spec in specs.items():
        assert (spec.role, spec.start) == ("scalar", 0.0)
        assert torch.equal(model.get_parameter(name), torch.zeros(4))
