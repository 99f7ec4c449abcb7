"""The Transformer-XL memory in the model: what tokens see of earlier segments, and what learns from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.memory.streams import lanes, sharp_model, stream, tables, tokens
from tests.models.tiny import VOCAB, tiny_config
from titan_lite.models.memory.xl import newest
from titan_lite.parallel.activation import apply_activation_checkpointing
from titan_lite.parallel.config import ActivationCheckpoint

ATOL = 1e-5
"""fp32, three layers, logits of size 0.1."""
SEEN = 1e-3
"""More than rounding: something else was seen."""
KERNELS = ["sdpa", "eager", pytest.param("flex", marks=pytest.mark.filterwarnings("ignore:flex_attention called"))]
POSITIONS: list[Any] = [
    {"type": "rope"},
    {"type": "rope", "direction": "reversed"},
    {"type": "rope", "fraction": 0.5, "layout": "interleaved", "frequencies": "learned"},
    {"type": "rope", "scaling": {"type": "yarn", "factor": 4.0, "original_max_len": 16}},
    "alibi",
    "none",
]


@torch.no_grad()
@pytest.mark.parametrize("recompute_kv", [False, True])
@pytest.mark.parametrize("position", POSITIONS, ids=str)
def test_segments_equal_the_whole_text(position: Any, recompute_kv: bool) -> None:
    changes = tables(position=position)
    model, text = sharp_model(**changes), tokens(24)
    whole = model(text)
    for sizes in ([8, 8, 8], [5, 11, 2, 6]):
        pieces = list(text.split(sizes, dim=1))
        logits = torch.cat(list(stream(model, lanes(24, changes, recompute_kv=recompute_kv), pieces)), dim=1)
        torch.testing.assert_close(logits, whole, atol=ATOL, rtol=0)
    alone = torch.cat([model(piece) for piece in text.split(8, dim=1)], dim=1)
    short = torch.cat(list(stream(model, lanes(2, changes, recompute_kv=recompute_kv), list(text.split(8, 1)))), dim=1)
    for other in (alone, short):
        assert torch.allclose(other[:, :8], whole[:, :8], atol=ATOL)
        assert (other[:, 8:] - whole[:, 8:]).abs().amax((0, 2)).min() > SEEN


@torch.no_grad()
@pytest.mark.parametrize("recompute_kv", [False, True])
@pytest.mark.parametrize(
    "attention",
    [
        {"type": "gqa_fused", "qk_norm": "rms_full"},
        {"qk_norm": "rms_per_head", "value_mix": "residual", "value_dim": 4},
        {"kernel": "eager", "score": {"type": "elu", "normalize": True}, "activation": "silu"},
        {"kernel": "eager", "sink": "logit", "gate": "element"},
        {"registers": {"type": "learned", "n": 3}, "position": "none"},
        {"masks": ["causal", {"type": "sliding_window", "window": 9}]},
    ],
    ids=str,
)
def test_with_other_parts_of_attention(attention: dict[str, Any], recompute_kv: bool) -> None:
    changes = tables(**attention)
    model, text = sharp_model(**changes), tokens(24)
    length = 8 if "masks" in attention else 24
    pieces = list(text.split(8, dim=1))
    logits = torch.cat(list(stream(model, lanes(length, changes, recompute_kv=recompute_kv), pieces)), dim=1)
    torch.testing.assert_close(logits, model(text), atol=ATOL, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_token_sees_as_far_back_as_memory_goes(kernel: str, n_layers: int) -> None:
    """Through one layer C tokens before its segment; through each more layer, C more."""
    changes, T, C = tables(n_layers, kernel=kernel), 4, 6
    model, text = sharp_model(**changes), tokens(20)
    with torch.compiler.set_stance("force_eager"):
        before = list(stream(model, lanes(C, changes), list(text.split(T, 1))))[-1]
        for changed in range(16):
            other = text.clone()
            other[:, changed] = (other[:, changed] + 1) % VOCAB
            after = list(stream(model, lanes(C, changes), list(other.split(T, 1))))[-1]
            # Memory of a layer goes back to the begin of a segment's memory, which for segment s is at 4 s - 6.
            reached = 16 - C if n_layers == 1 else min(4 * s - C for s in (2, 3, 4))
            assert ((before - after).abs().max() > 1e-6) == (changed >= reached), changed


@torch.no_grad()
@pytest.mark.parametrize("recompute_kv", [False, True])
def test_memory_lengthens_the_text_that_a_scaling_sees(recompute_kv: bool) -> None:
    """LSWTransformer's: a segment of 8 with 16 before it is turned as the end of a text of 24."""
    changes = tables(1, position={"direction": "reversed", "scaling": {"type": "lswt", "train_len": 8, "a": 0.3}})
    model, text = sharp_model(**changes), tokens(32)
    *_, last = stream(model, lanes(16, changes, recompute_kv=recompute_kv), list(text.split(8, 1)))
    torch.testing.assert_close(last, model(text[:, 8:])[:, -8:], atol=ATOL, rtol=0)
    plain = sharp_model(**tables(1, position={"direction": "reversed"}))
    assert (last - plain(text[:, 8:])[:, -8:]).abs().max() > SEEN


def documents_of(bounds: list[list[int]], length: int) -> Tensor:
    """(B, length): which document of its lane each token is of, given where others begin."""
    return torch.stack([(torch.arange(length)[:, None] >= torch.tensor(row)).sum(1) for row in bounds])


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recompute_kv", [False, True])
def test_memory_of_other_documents_is_forgotten(kernel: str, recompute_kv: bool) -> None:
    """With a document mask: every document as if it stood alone, wherever segments are cut."""
    changes = tables(masks=["causal", "document"], kernel=kernel)
    model, text = sharp_model(**changes), tokens(24)
    owner = documents_of([[3, 8, 17], [11, 16, 23]], 24)  # two begin where a segment does
    pieces, documents, before = [], [], torch.full((2, 1), -1)
    for piece, owners in zip(text.split(8, 1), owner.split(8, 1), strict=True):
        pieces.append(piece)
        documents.append(owners - before)  # 0 = that of the token before
        before = owners[:, -1:]
    with torch.compiler.set_stance("force_eager"):
        memory = lanes(24, changes, reset_on_bos=True, recompute_kv=recompute_kv)
        logits = torch.cat(list(stream(model, memory, pieces, documents)), dim=1)
        whole = model(text, owner)
    torch.testing.assert_close(logits, whole, atol=ATOL, rtol=0)


@torch.no_grad()
def test_without_a_document_mask_only_memory_is_cut() -> None:
    changes = tables(1)
    model, text = sharp_model(**changes), tokens(16)
    first, second = text.split(8, 1)
    for begins in (0, 1):
        logits = list(
            stream(
                model,
                lanes(8, changes, reset_on_bos=True),
                [first, second],
                [documents_of([[0, 5], [0, 2]], 8), torch.full_like(second, begins)],
            )
        )
        torch.testing.assert_close(logits[0], model(first), atol=ATOL, rtol=0)
        for row, start in enumerate((5, 2)):
            known = model(text[row : row + 1, start if begins == 0 else 8 :])[:, -8:]
            torch.testing.assert_close(logits[1][row : row + 1], known, atol=ATOL, rtol=0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def graded(changes: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a third segment and the gradients of a loss on them alone."""
    model, memory = sharp_model(**changes), lanes(16, changes, **options)
    *_, last = stream(model, memory, list(tokens(24).split(8, 1)))
    return last, gradients(model, last.sin().sum())


def detached_before(n: int, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the same loss in one forward, in which each attention's first n inputs are constants."""
    model = sharp_model(**changes)
    for block in model.stack.blocks.values():
        block.attention.register_forward_pre_hook(
            lambda _, args: (torch.cat((args[0][:, :n].detach(), args[0][:, n:]), dim=1), *args[1:])
        )
    return gradients(model, model(tokens(24))[:, n:].sin().sum())


@pytest.mark.parametrize("fused", [False, True])
def test_keys_and_values_that_are_made_anew_teach_their_matrices(fused: bool) -> None:
    changes = tables(type="gqa_fused" if fused else "gqa")
    kept, without = graded(changes)
    made, within = graded(changes, recompute_kv=True)
    torch.testing.assert_close(made, kept, atol=ATOL, rtol=0)
    expected = detached_before(16, changes)
    for name, gradient in within.items():
        torch.testing.assert_close(gradient, expected[name], atol=ATOL * 10, rtol=0, msg=name)
        if fused or not any(part in name for part in (".attention.k.", ".attention.v.")):
            continue
        assert not torch.allclose(gradient, without[name], atol=1e-3), name
    if not fused:
        for i in range(3):
            name = f"stack.blocks.{i}.attention.q.weight"
            torch.testing.assert_close(within[name], without[name], atol=ATOL * 10, rtol=0)


@pytest.mark.parametrize("recompute_kv", [False, True])
def test_recomputed_and_compiled_blocks(recompute_kv: bool) -> None:
    changes = tables(2, registers={"type": "learned", "n": 2}, masks=["causal", "document"])
    found = []
    for recomputed in (False, True):
        model = sharp_model(**changes).train()
        if recomputed:
            apply_activation_checkpointing(model, ActivationCheckpoint(mode="full"))
            for block in model.stack.blocks.values():
                block.compile(backend="aot_eager", fullgraph=True)
        memory = lanes(6, changes, recompute_kv=recompute_kv, reset_on_bos=True)
        torch._dynamo.utils.counters.clear()
        logits = list(stream(model, memory, list(tokens(12).split(4, 1))))
        if recomputed:
            # One graph serves every block and every segment, the first one, whose memory is empty, included.
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        loss = torch.cat(logits, dim=1).sin().sum()
        found.append([loss, *gradients(model, loss).values()])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_memory_has_no_gradient_and_its_own_storage() -> None:
    changes = tables(2)
    model, memory = sharp_model(**changes), lanes(4, changes)
    list(stream(model, memory, list(tokens(16).split(8, 1))))
    for kept in memory.of(torch.arange(2)).layers:
        for tensor in kept:
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert not list(model.buffers())


def test_newest() -> None:
    old, new = torch.arange(5.0)[None], torch.arange(10.0, 20.0)[None]
    assert newest(old, new[:, :3], 1).tolist() == [[3, 4, 10, 11, 12]]
    assert newest(old, new[:, :5], 1).tolist() == [[10, 11, 12, 13, 14]]
    assert newest(old, new, 1).tolist() == [[15, 16, 17, 18, 19]]


def test_plain_forwards_know_nothing_of_it() -> None:
    """A model with memory is the plain one wherever no memory is given: validation, decoding."""
    plain, with_memory = (sharp_model(**tables(), memory=memory) for memory in ("none", {"type": "xl", "length": 4}))
    assert tiny_config(memory={"type": "xl", "length": 4}).memory.span(8) == 12
    assert torch.equal(plain(tokens(9)), with_memory(tokens(9)))
