"""What flash_attn is told, on a machine that cannot run it.

The package has CUDA kernels only. A stand-in with the signatures of flash_attn 2.8 takes its place here: it computes,
with plain matrix products in float32, what the package's documentation says of each argument. So these tests show that
our arguments mean what we want, as far as the documentation is right; not that the kernels do what it says.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.attention.cases import DH, MASKS, SCORES, B, Case, Slope
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache
from titan_lite.models.attention.kernel.flash import FlashAttention, document_bounds
from titan_lite.models.position.alibi import ALiBiBias

ATOL = 1e-5


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """(B, T, H, Dh), (B, S, G, Dh), (B, S, G, Dh) -> (B, T, H, Dh); the last query is aligned with the last key."""
    assert dropout_p == 0.0
    assert not return_attn_probs
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        scores = scores - alibi_slopes[:, None, None] * (i - j).abs()
    left, right = window_size
    hidden = (left >= 0) & (j < i - left) | ((right >= 0) & (j > i + right)) | (causal & (j > i))
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """(tokens, H, Dh), (tokens, G, Dh), (tokens, G, Dh) -> (tokens, H, Dh), sequence by sequence."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    lengths = [(cu_seqlens_q.diff().tolist(), max_seqlen_q), (cu_seqlens_k.diff().tolist(), max_seqlen_k)]
    for each, longest in lengths:
        assert 0 < min(each) <= max(each) <= longest
    sequences = zip(q.split(lengths[0][0]), k.split(lengths[1][0]), v.split(lengths[1][0]), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in parts), *options)[0] for parts in sequences])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The stand-in is installed, its kernels run here, and its calls are listed."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def listed(function: Any) -> Any:
        def call(*tensors: Tensor, **options: Any) -> Tensor:
            seen.append((function.__name__, options))
            return function(*tensors, **options)

        return call

    module = SimpleNamespace(
        __spec__=ModuleSpec("flash_attn", None, origin="a test"),
        flash_attn_func=listed(flash_attn_func),
        flash_attn_varlen_func=listed(flash_attn_varlen_func),
    )
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(FlashAttention, "runs_on", lambda self, q: True)
    return seen


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("score", ["softmax", "capped"])
@pytest.mark.parametrize("alibi", [False, True])
def test_against_the_definition(calls: list[Any], masks: str, score: str, alibi: bool) -> None:
    bias = {"bias": ALiBiBias(4)} if alibi else {}
    case = Case(masks=MASKS[masks], score=SCORES[score], value_dim=DH, **bias)
    torch.testing.assert_close(case.run("flash_attn").double(), case.expected(), atol=ATOL, rtol=0)
    ((function, options),) = calls
    assert function == ("flash_attn_varlen_func" if "document" in masks else "flash_attn_func")
    assert options["window_size"] == ((4, 0) if "window" in masks else (-1, 0))
    assert options["deterministic"] is False


def test_deterministic_algorithms_are_passed_on(calls: list[Any]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        Case(value_dim=DH).run("flash_attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[0][1]["deterministic"] is True


def test_bounds_of_documents() -> None:
    documents = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 2]])
    assert document_bounds(documents).tolist() == [0, 3, 4, 5, 7, 8]
    assert document_bounds(torch.zeros(3, 5)).tolist() == [0, 5, 10, 15]  # rows are apart, whatever their numbers


@pytest.mark.parametrize("here", [True, False])
def test_decoding(here: bool, request: pytest.FixtureRequest) -> None:
    """With the package, and on a machine without it, where the results come from the eager kernel."""
    calls = request.getfixturevalue("calls") if here else None
    attention = {"n_heads": 4, "n_kv_heads": 2, "masks": MASKS["window"], "score": "softmax_capped"}
    model = tiny_model(attention=attention | {"kernel": "flash_attn"})
    tokens = torch.randint(VOCAB, (B, 17))
    whole = model(tokens)
    torch.testing.assert_close(whole, tiny_model(attention=attention | {"kernel": "eager"})(tokens), atol=ATOL, rtol=0)
    cache = KVCache(17)
    pieces = []
    for piece in tokens.split([5, 1, 3, 1, 7], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=ATOL, rtol=0)
    assert calls is None or len(calls) == 12


def test_a_bias_that_flash_attn_does_not_know() -> None:
    with pytest.raises(AssertionError, match="no other bias"):
        Case(bias=Slope()).kernel("flash_attn")
