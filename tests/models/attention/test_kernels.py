"""Every kernel against attention written down in float64, its gradients, its decoding, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.attention.cases import COMPUTES, DH, MASKS, SCORES, B, Case, G, H, Slope
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.generation import KVCache
from titan_lite.job import Job
from titan_lite.models.attention.kernel.base import WASTE
from titan_lite.models.context import TrainingFacts
from titan_lite.models.dropout import Noise
from titan_lite.models.position import ScoreBias
from titan_lite.parallel.activation import apply_activation_checkpointing
from titan_lite.parallel.config import ActivationCheckpoint

ATOL = 1e-5
"""fp32 against float64, one attention."""
GRADIENT_ATOL = 2e-5
"""Sums over up to 150 tokens."""

ON_CUDA = 'on a machine with CUDA devices it is "flex", which leaves them out'

LONG = 150
"""More tokens than a block of FlexAttention, and no multiple of one."""

EVERY = [pytest.param(kernel, score, id=f"{kernel}-{score}") for kernel, scores in COMPUTES.items() for score in scores]


@pytest.fixture(autouse=True)
def quiet_flex() -> Iterator[None]:
    """FlexAttention says that it holds all scores on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@pytest.fixture
def eager_calls() -> Iterator[None]:
    """Nothing is compiled, as while a model generates: FlexAttention is then called at once, not through dynamo."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def trainable_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets FlexAttention's backward run on a CPU, where it is right but not supported (test only)."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def noise(rows: list[int], step: int = 0) -> Noise:
    return Noise.of(0, torch.device("cpu"), step, torch.tensor(rows))


@pytest.mark.usefixtures("eager_calls")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("kernel", "score"), EVERY)
def test_against_the_definition(kernel: str, score: str, masks: str) -> None:
    for bias in (ScoreBias(), Slope()):
        for n_tokens in (13, LONG):
            case = Case(n_tokens, MASKS[masks], SCORES[score], bias)
            steady = case.steady()
            assert steady.float().mean() > 0.9
            ours, theirs = case.run(kernel).double()[steady], case.expected()[steady]
            torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kernel", COMPUTES)
@pytest.mark.parametrize("groups", [1, H])
def test_multi_query_and_multi_head(kernel: str, groups: int) -> None:
    case = Case(masks=MASKS["window"], groups=groups, value_dim=DH)
    torch.testing.assert_close(case.run(kernel).double(), case.expected(), atol=ATOL, rtol=0)


def test_one_key_value_head_per_query_head_equals_repeated_ones() -> None:
    grouped = Case()
    whole = Case(groups=H)
    whole.q = grouped.q
    whole.k, whole.v = (x.repeat_interleave(H // G, dim=1) for x in (grouped.k, grouped.v))
    for kernel in COMPUTES:
        torch.testing.assert_close(grouped.run(kernel), whole.run(kernel), atol=ATOL, rtol=0)


def gradients(case: Case, attend: Callable[[Case], Tensor]) -> list[Tensor]:
    """Of queries, keys and values, by a random direction of the results."""
    case, steady = copy.copy(case), case.steady()
    case.q, case.k, case.v = (tensor.clone().requires_grad_() for tensor in case.tensors())
    y = attend(case)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward((direction * steady[..., None]).to(y.dtype))
    return [tensor.grad for tensor in case.tensors()]


@pytest.mark.usefixtures("trainable_flex")
@pytest.mark.parametrize(("kernel", "score"), EVERY)
def test_gradients(kernel: str, score: str) -> None:
    case = Case(13 if kernel != "flex" else LONG, MASKS["window and document"], SCORES[score], Slope())
    ours, theirs = gradients(case, lambda case: case.run(kernel)), gradients(case, Case.expected)
    torch.testing.assert_close(ours, theirs, atol=GRADIENT_ATOL, rtol=0)


@pytest.mark.usefixtures("eager_calls")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("kernel", "score"), EVERY)
def test_a_token_reaches_those_that_see_it(kernel: str, score: str, masks: str) -> None:
    """And no other one: nothing before it, nothing behind the window, nothing in other documents."""
    case = Case(masks=MASKS[masks], score=SCORES[score])
    before, token = case.run(kernel), 4
    for tensor in case.tensors():
        tensor[:, :, token] = -tensor[:, :, token]
    changed = (case.run(kernel) != before).any(-1).any(1)  # (B, T)
    sees = case.visible()[:, :, token]
    assert not (changed & ~sees).any()
    if not score.startswith("relu"):  # whose weights may be 0 for a key that is seen
        assert torch.equal(changed, sees)


@pytest.mark.usefixtures("eager_calls")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("kernel", "score"), EVERY)
def test_decoding_piece_by_piece(kernel: str, score: str, masks: str) -> None:
    for bias in (ScoreBias(), Slope()):
        case = Case(masks=MASKS[masks], score=SCORES[score], bias=bias)
        attend = case.kernel(kernel)
        pieces = []
        for start, stop in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 13)):
            context = case.context(attend, start, stop, documents=False)
            pieces.append(attend(case.q[:, :, start:stop], case.k[:, :, :stop], case.v[:, :, :stop], context))
        whole = attend(*case.tensors(), case.context(attend, documents=False))
        torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("eager_calls")
@pytest.mark.parametrize(
    "choices",
    [
        {"kernel": "eager", "score": "relu_squared"},
        {"kernel": "eager", "score": {"type": "elu", "normalize": True}},
        {"kernel": "sdpa", "position": "alibi"},
        {"kernel": "flex", "score": "softmax_capped", "sink": "logit"},
    ],
    ids=str,
)
def test_a_model_decodes_with_its_cache(choices: dict[str, Any]) -> None:
    attention = {"n_heads": 4, "n_kv_heads": 2, "masks": MASKS["window and document"], **choices}
    model = tiny_model(attention=attention)
    tokens = torch.randint(VOCAB, (2, 17))
    cache = KVCache(17)
    pieces = []
    with torch.no_grad():
        for piece in tokens.split([5, 1, 3, 1, 7], dim=1):
            pieces.append(model(piece, memory=cache))
            cache.advance(piece.shape[1])
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("window", "documents"), [(1, False), (128, False), (200, False), (1024, False), (1024, True)])
def test_flex_visits_only_blocks_that_are_seen(window: int, documents: bool) -> None:
    """A window of W reaches over at most ceil((W - 1) / 128) + 1 blocks of keys for each block of queries."""
    masks = ["causal", {"type": "sliding_window", "window": window}, *["document"] * documents]
    case = Case(1024, masks, value_dim=1)
    kernel = case.kernel("flex")
    mask = case.context(kernel).prepared[kernel.key].block_mask
    visited = mask.kv_num_blocks + mask.full_kv_num_blocks  # (B or 1, 1, blocks of queries)
    reach = (window - 1 + 127) // 128 + 1
    if not documents:
        assert visited.shape[0] == 1  # one mask for all rows
        assert visited.flatten().tolist() == [min(block + 1, reach) for block in range(8)]
        return
    blocks = case.documents.view(B, 8, 128)
    first, last = blocks[..., 0], blocks[..., -1]
    meets = (first[:, :, None] <= last[:, None, :]) & (last[:, :, None] >= first[:, None, :])
    assert torch.equal(visited[:, 0], (meets & torch.ones(8, 8).tril().bool()).sum(-1))


def test_flex_in_a_compiled_block_is_compiled_once(trainable_flex: None) -> None:
    """Two equal layers and new documents in each step: one graph; its gradients are those of the eager kernel."""
    attention = {"n_heads": 4, "n_kv_heads": 2, "masks": MASKS["window and document"], "score": "softmax_capped"}
    models = [tiny_model(attention=attention | {"kernel": kernel, "sink": "logit"}) for kernel in ("eager", "flex")]
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for block in models[1].stack.blocks.values():
        block.compile(backend=count, fullgraph=True)
    tokens = torch.randint(VOCAB, (2, 20))
    for step in range(3):
        documents = (torch.arange(20).expand(2, -1) // (5 + step)).int()
        losses = []
        for model in models:
            model.zero_grad()
            losses.append(model(tokens, documents).sin().sum())
            losses[-1].backward()
        torch.testing.assert_close(*losses, atol=1e-4, rtol=0)
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("score", ["softmax_capped", "elu"])
def test_the_eager_kernel_recomputed_and_compiled(score: str) -> None:
    """With dropped weights: the recomputed ones are the same."""
    attention = {"n_heads": 4, "n_kv_heads": 2, "masks": MASKS["document"], "score": score, "dropout": 0.3}
    tokens, documents = torch.randint(VOCAB, (2, 20)), (torch.arange(20).expand(2, -1) // 7).int()
    found = []
    for changed in (False, True):
        model = tiny_model(attention=attention | {"kernel": "eager", "position": "alibi"})
        if changed:
            apply_activation_checkpointing(model, ActivationCheckpoint(mode="full"))
            for block in model.stack.blocks.values():
                block.compile(backend="aot_eager", fullgraph=True)
        loss = model(tokens, documents, facts=TrainingFacts(noise([3, 8]))).sin().sum()
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_layers_share_what_is_prepared() -> None:
    for kernel in COMPUTES:
        attention = {"n_heads": 4, "n_kv_heads": 2, "masks": MASKS["window and document"], "kernel": kernel}
        model = tiny_model(attention=attention)
        documents = torch.zeros(2, 8, dtype=torch.int)
        prepared = model.context(torch.zeros(2, 8, dtype=torch.long), documents).prepared
        assert len(prepared) == 2  # one for positions, one for both layers' kernels


@pytest.mark.usefixtures("eager_calls")
def test_layers_that_differ_do_not_share() -> None:
    attention = {"n_heads": 4, "n_kv_heads": 2, "scale": 20.0, "score": {"type": "softmax_capped", "cap": 2.0}}
    changes: list[dict[str, Any]] = [
        {"score": {"type": "softmax_capped", "cap": 0.1}},
        {"masks": MASKS["window"]},
        {"position": "alibi"},
    ]
    tokens = torch.randint(VOCAB, (2, 20))
    for change in changes:
        layers = [{"at": "1", "attention": change}]
        models = [tiny_model(attention=attention | {"kernel": kernel}, layers=layers) for kernel in ("eager", "flex")]
        uniform = tiny_model(attention=attention | {"kernel": "eager"})
        with torch.no_grad():
            eager, flex, other = (model(tokens) for model in (*models, uniform))
        torch.testing.assert_close(flex, eager, atol=ATOL, rtol=0)
        assert not torch.allclose(eager, other, atol=1e-4)


def test_dropped_weights() -> None:
    case = Case(40, value_dim=40, dropout=0.25)
    case.v = torch.eye(40).expand(B, G, -1, -1)  # what comes out are the weights
    weights, dropped = case.run("eager"), case.run("eager", noise([3, 8]))
    seen = case.visible()[:, None].expand(-1, H, -1, -1)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75, atol=1e-6, rtol=0)
    assert 0.22 < 1 - kept[seen].float().mean() < 0.28  # 6560 draws: 0.25 and 5 standard errors
    assert torch.equal(case.run("eager", noise([3, 8])), dropped)
    assert not torch.equal(case.run("eager", noise([3, 8], step=1)), dropped)
    swapped = Case(40, value_dim=40, dropout=0.25)
    swapped.q, swapped.k, swapped.v = (x.flip(0) for x in case.tensors())
    assert torch.equal(swapped.run("eager", noise([8, 3])), dropped.flip(0))  # a row's draw goes with its number


def test_bfloat16_stays_close() -> None:
    for kernel in ("eager", "sdpa"):
        for bias in (ScoreBias(), Slope()):
            case = Case(masks=MASKS["window"], bias=bias, value_dim=DH)
            expected = case.expected()
            case.q, case.k, case.v = (x.bfloat16() for x in case.tensors())
            y = case.run(kernel)
            assert y.dtype == torch.bfloat16
            # 8 bits of precision in values around 1.
            torch.testing.assert_close(y.double(), expected, atol=5e-2, rtol=0)


Refused = list[tuple[str, str]]

REFUSALS: dict[str, tuple[dict[str, Any], Refused]] = {
    "sdpa": (
        {"kernel": "sdpa", "score": "softmax_capped", "dropout": 0.1, "sink": "logit"},
        [("E005", "score.type"), ("E005", "dropout"), ("E005", "sink.type")],
    ),
    "sdpa, elu": ({"kernel": "sdpa", "score": "elu"}, [("E005", "score.type")]),
    "flex": (
        {"kernel": "flex", "score": "relu_squared", "dropout": 0.1},
        [("E005", "score.type"), ("E005", "dropout"), ("E014", "kernel.type")],
    ),
    "flash_attn": (
        {"kernel": "flash_attn", "score": "elu", "dropout": 0.1, "value_dim": 24},
        [
            ("E005", "score.type"),
            ("E005", "dropout"),
            ("E005", "value_dim"),
            ("E014", "kernel.type"),
        ],
    ),
    "flash_attn, wide heads and a sink": (
        {"kernel": "flash_attn", "head_dim": 264, "sink": "logit"},
        [("E005", "sink.type"), ("E005", "head_dim"), ("E014", "kernel.type")],
    ),
    "sink without softmax": ({"kernel": "eager", "score": "elu", "sink": "logit"}, [("E005", "sink.type")]),
    "auto without softmax": ({"score": "elu", "sink": "logit"}, [("E005", "sink.type")]),
    "auto": ({"score": "elu", "dropout": 0.1, "value_dim": 24}, []),
    "auto with a sink": ({"score": "softmax_capped", "dropout": 0.1, "sink": "logit"}, []),
    "eager": ({"kernel": "eager", "score": "elu", "dropout": 0.1, "value_dim": 24}, []),
    "eager with a sink": ({"kernel": "eager", "score": "softmax_capped", "dropout": 0.1, "sink": "logit"}, []),
}


def job(attention: dict[str, Any], files: bool = True, **sections: Any) -> Job:
    return job_from_dict({"model": {"dim": 64, "attention": {"n_heads": 4} | attention}, **sections}, files=files)


def refused(attention: dict[str, Any], **keywords: Any) -> list[tuple[str, str, str, str]]:
    try:
        job(attention, **keywords)
    except ConfigError as error:
        return [(p.code, p.key.removeprefix("model.attention."), p.why, p.allowed) for p in error.problems]
    return []


@pytest.mark.parametrize(("attention", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_kernel_does_not_compute_is_refused(attention: dict[str, Any], expected: Refused) -> None:
    found = refused(attention)
    assert [(code, key) for code, key, *_ in found] == expected
    for code, key, why, allowed in found:
        if code == "E005" and key != "sink.type":
            assert f'kernel = "{attention.get("kernel", "sdpa")}"' in why
            assert "kernel = " in allowed
    # Another machine may have what this one lacks.
    assert [(code, key) for code, key, *_ in refused(attention, files=False)] == [p for p in expected if p[0] == "E005"]


def test_the_kernels_that_could_are_named() -> None:
    (*_, allowed), *_ = refused({"kernel": "sdpa", "score": "softmax_capped"})
    assert allowed == '"softmax", or kernel = "auto" or "eager" or "flash_attn" or "flex"'
    (*_, allowed), *_ = refused({"kernel": "sdpa", "sink": "logit"})
    assert allowed == '"none", or kernel = "auto" or "eager" or "flex"'


def test_what_the_machine_must_have(monkeypatch: pytest.MonkeyPatch) -> None:
    others = '"auto", "sdpa" or "eager"'
    why = "flash_attn runs on CUDA only, and there is no CUDA device on this machine"
    assert refused({"kernel": "flash_attn"}) == [("E014", "kernel.type", why, others)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    why = "flash_attn is not installed: pip install 'titan_lite[flash]'"
    assert refused({"kernel": "flash_attn"}) == [("E014", "kernel.type", why, others)]
    assert refused({"kernel": "flex"}) == []
    assert [key for _, key, *_ in refused({"kernel": "flex", "head_dim": 8})] == ["head_dim", "value_dim"]
    monkeypatch.setattr("titan_lite.models.attention.kernel.flash.is_installed", lambda name: name == "flash_attn")
    assert refused({"kernel": "flash_attn"}) == []
    in_float32 = refused({"kernel": "flash_attn"}, training={"mixed_precision_param": "float32"})
    assert [(code, key) for code, key, *_ in in_float32] == [("E005", "kernel.type")]
    assert "training.mixed_precision_param" in in_float32[0][2]
    assert in_float32[0][3] == f'{others}, or training.mixed_precision_param = "bfloat16"'


def test_scores_that_are_computed_for_nothing_are_said_once() -> None:
    masks = MASKS["window"]
    line = 'kernel = "sdpa" also computes the scores that a window or a document mask hides; '
    line += 'kernel = "flash_attn" or "flex" leaves them out, on a machine with CUDA devices'
    assert job({}).warnings == ()
    assert job({"masks": masks, "kernel": "sdpa"}).warnings == (line,)
    model = {"dim": 64, "attention": {"n_heads": 4, "kernel": "sdpa", "masks": MASKS["document"]}}
    entries = [{"at": "1::2", "attention": {"masks": masks}}]
    assert job_from_dict({"model": model | {"layers": entries}}).warnings == (line,)
    assert job({"masks": masks, "kernel": "flex"}, files=False).warnings == ()
    only_eager = job({"masks": masks, "kernel": "eager", "score": "elu"}).warnings
    assert only_eager == ('kernel = "eager" also computes the scores that a window or a document mask hides',)


@pytest.mark.parametrize(
    ("attention", "here", "on_cuda"),
    [
        ({}, "", ""),
        ({"score": "softmax_capped"}, "", ""),
        ({"masks": MASKS["window"]}, f'"sdpa" here, which {WASTE}; {ON_CUDA}', ""),
        ({"masks": MASKS["document"], "sink": "logit"}, f'"eager" here, which {WASTE}; {ON_CUDA}', ""),
        ({"masks": MASKS["window"], "score": "elu"}, f'"eager" here, which {WASTE}', f'"eager" here, which {WASTE}'),
        (
            {"masks": MASKS["window"], "head_dim": 8},
            f'"sdpa" here, which {WASTE}; {ON_CUDA}',
            f'"sdpa" here, which {WASTE}; kernel = "flash_attn" leaves them out',
        ),
    ],
    ids=str,
)
def test_what_auto_computes_for_nothing_is_said(
    attention: dict[str, Any], here: str, on_cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for devices, expected in ((0, here), (8, on_cuda)):
        monkeypatch.setattr("torch.cuda.device_count", lambda devices=devices: devices)
        assert job(attention).warnings == ((f'kernel = "auto" is {expected}',) if expected else ())


def test_flex_that_is_asked_to_train_on_a_cpu_says_so() -> None:
    """The reason for the refusal holds: once this test fails, it can go."""
    case = Case()
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        gradients(case, lambda case: case.run("flex"))
