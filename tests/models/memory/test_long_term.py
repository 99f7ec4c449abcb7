"""Long-term memory in the model: what is looked up, where it stands, and who sees it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.memory.streams import B, lanes, sharp_model, stream, tables, tokens
from tests.models.tiny import VOCAB
from titan_lite.generation import Sampling, generate
from titan_lite.models.flops import anew_flops_per_token
from titan_lite.models.memory import XL, LongTerm
from titan_lite.models.memory.long_term import LongTermMemory
from titan_lite.models.memory.xl import segments_of
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.activation import apply_activation_checkpointing
from titan_lite.parallel.config import ActivationCheckpoint

ATOL = 1e-5
"""fp32, two layers, logits of size 0.1."""
SEEN = 1e-3
"""More than rounding: something else was seen."""
KERNELS = ["sdpa", "eager", pytest.param("flex", marks=pytest.mark.filterwarnings("ignore:flex_attention called"))]
T, C, S, N, M = 8, 8, 4, 4, 2
"""A segment of the training; tokens just before it; tokens of a segment that is kept, and how many; those shown."""
FAR: dict[str, Any] = {"type": "long_term", "segment": S, "segments": N, "retrieve": M}


def model_with(n_layers: int = 2, memory: dict[str, Any] | None = None, **attention: Any) -> Transformer:
    """A model whose statistics are those of some summaries."""
    model = sharp_model(memory=FAR | {"length": C} | (memory or {}), **tables(n_layers, **attention))
    generator = torch.Generator().manual_seed(1)
    whitening = model.summaries.train()
    whitening.count(torch.randn(2, 50, 32, generator=generator) * torch.linspace(0.1, 2, 32))
    whitening.after_step(lambda tensor: tensor)
    return model.eval()


def memory_of(model: Transformer, n_layers: int = 2, **options: Any) -> XL:
    return lanes(C, tables(n_layers), model.summaries, **(FAR | options))


def pieces_of(n: int, rows: int = B) -> list[Tensor]:
    return list(tokens(n * T, rows).split(T, dim=1))


def current(memory: XL) -> LongTermMemory:
    """What the next segment will be shown."""
    slot = memory.of(torch.arange(B))
    assert isinstance(slot, LongTermMemory)
    return slot


@torch.no_grad()
@pytest.mark.parametrize("recompute_kv", [False, True])
def test_without_retrieval_it_is_xl(recompute_kv: bool) -> None:
    model, pieces = model_with(), pieces_of(5)
    far = stream(model, memory_of(model, retrieve=0, recompute_kv=recompute_kv), pieces)
    near = stream(model, lanes(C, tables(2), recompute_kv=recompute_kv), pieces)
    for one, other in zip(far, near, strict=True):
        assert torch.equal(one, other)


def chosen_by_definition(model: Transformer, summaries: Tensor) -> Tensor:
    """(B, m) of the segments (B, n, D) but for the near ones: the largest cosines with the newest, whitened by ZCA."""
    whitening = model.summaries
    values, vectors = torch.linalg.eigh(whitening.covariance)
    white = (summaries.double() - whitening.mean) @ vectors @ torch.diag((values + whitening.eps).rsqrt()) @ vectors.T
    first, last = max(0, summaries.shape[1] - C // S - N), summaries.shape[1] - C // S
    cosines = F.cosine_similarity(white[:, first:last], white[:, -1:], dim=-1)
    return first + cosines.sort(dim=-1).indices[:, -M:]


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recompute_kv", [False, True])
def test_a_segment_sees_what_was_looked_up_as_if_it_stood_in_the_text(kernel: str, recompute_kv: bool) -> None:
    """One layer without positions, whose keys and values depend on their tokens alone."""
    model, pieces = model_with(1, position="none", kernel=kernel), pieces_of(7)
    hidden: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    looked_up: set[int] = set()
    with torch.compiler.set_stance("force_eager"):
        memory = memory_of(model, 1, recompute_kv=recompute_kv)
        logits = list(stream(model, memory, pieces))
        summaries = torch.cat([x.unflatten(1, (-1, S)).mean(2) for x in hidden], dim=1)
        for i in range(len(pieces)):
            text = torch.cat(pieces[max(0, i - 1) : i + 1], dim=1)
            if i > 1:
                before = torch.cat(pieces[:i], dim=1)
                chosen = chosen_by_definition(model, summaries[:, : i * T // S])
                looked_up |= set(chosen.flatten().tolist())
                text = torch.cat((segments_of(before, chosen, S), text), dim=1)
            expected = model(text)[:, -T:]
            torch.testing.assert_close(logits[i], expected, atol=ATOL, rtol=0)
        alone = list(stream(model, lanes(C, tables(1)), pieces))
    assert len(looked_up) > 3
    assert all((logits[i] - alone[i]).abs().amax((0, 2)).min() > SEEN for i in range(2, len(pieces)))


def turned(x: Tensor, positions: Tensor, sign: int) -> Tensor:
    """Pairs (j, j + 4) of heads of width 8 turned by t 10000^(-j/4)."""
    number = torch.complex(x[..., :4], x[..., 4:])
    angles = sign * positions[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    number = number * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((number.real, number.imag), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("position", ["forward", "reversed", "alibi"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_that_is_looked_up_stands_one_before_the_rest(position: str, kernel: str) -> None:
    """The attention of a third segment, written down."""
    table: Any = "alibi" if position == "alibi" else {"type": "rope", "direction": position}
    model, pieces = model_with(1, position=table, kernel=kernel), pieces_of(3)
    seen: list[tuple[Tensor, Tensor]] = []
    attention = model.stack.blocks["0"].attention
    attention.o.register_forward_pre_hook(lambda _, args: seen.append((args[0], torch.empty(0))))
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.compiler.set_stance("force_eager"):
        memory = memory_of(model, 1)
        list(stream(model, memory, pieces[:2]))
        chosen = current(memory).chosen - (N - 2)  # two have fallen out so far
        list(stream(model, memory, pieces[2:]))
    far = segments_of(inputs[0], chosen, S)
    assert (chosen >= 0).all()
    x = torch.cat((far, *inputs[1:]), dim=1)
    q, k, v = attention.project(x)
    at = torch.cat((torch.zeros(M * S), torch.arange(1, 1 + C + T)))
    if position != "alibi":
        q, k = (turned(y, at, 1 if position == "forward" else -1) for y in (q, k))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = (q @ k.mT / math.sqrt(8))[:, :, -T:]
    if position == "alibi":
        slopes = 2.0 ** -torch.arange(2, 9, 2)
        scores = scores - slopes[:, None, None] * (at[-T:, None] - at)
    future = at[None, :] > at[-T:, None]
    expected = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[-1][0], expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_no_token_sees_the_future_or_another_row() -> None:
    model, pieces = model_with(), pieces_of(6)
    before = torch.cat(list(stream(model, memory_of(model), pieces)), dim=1)
    for changed in (0, 13, 30, 41, 47):
        text = torch.cat(pieces, dim=1)
        text[1, changed] = (text[1, changed] + 1) % VOCAB
        after = torch.cat(list(stream(model, memory_of(model), list(text.split(T, 1)))), dim=1)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1, :changed], after[1, :changed])
        assert not torch.equal(before[1, changed], after[1, changed])


@torch.no_grad()
def test_a_planted_segment_is_found() -> None:
    """One that is like the newest, among others; each row has it elsewhere."""
    model = model_with()
    text = tokens(6 * T)
    needle = torch.tensor([3, 1, 4, 1])
    text[:, -S:] = needle
    kept = (6 * T - C) // S - N
    for row, place in ((0, kept + 2), (1, kept)):
        text[row, place * S : place * S + S] = needle
    memory = memory_of(model)
    list(stream(model, memory, list(text.split(T, 1))))
    assert current(memory).chosen[:, -1].tolist() == [2, 0]


@torch.no_grad()
def test_at_first_there_is_less_to_see() -> None:
    """Segments that are missing are not shown in place of others: until the first fell out, it is XL."""
    model, pieces = model_with(memory={"retrieve": N}), pieces_of(5)
    memory = memory_of(model, retrieve=N)
    shown = []
    for piece in pieces:
        slot = current(memory)
        shown.append(slot.there().tolist())
        assert slot.first_key(torch.zeros_like(piece)).tolist() == [slot.length - shown[-1][0]]
        list(stream(model, memory, [piece]))
    assert shown == [[n] * B for n in (0, 8, 16, 24, 24)]
    near = list(stream(model, lanes(C, tables(2)), pieces[:2]))
    far = list(stream(model, memory_of(model, retrieve=N), pieces[:2]))
    torch.testing.assert_close(far, near, atol=ATOL, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_documents_are_not_looked_up(kernel: str) -> None:
    model, pieces = model_with(masks=["causal", "document"], kernel=kernel), pieces_of(6)
    starts = {2: 3, 4: 0}  # in the third segment at token 3, and with the fifth
    documents = [(torch.arange(T) >= starts.get(i, T)).int().expand(B, -1) for i in range(6)]
    changed = [(piece + 1) % VOCAB if i < 2 else piece for i, piece in enumerate(pieces)]
    with torch.compiler.set_stance("force_eager"):
        found = [
            torch.cat(list(stream(model, memory_of(model, reset_on_bos=True), text, documents)), dim=1)
            for text in (pieces, changed)
        ]
        memory = memory_of(model, reset_on_bos=True)
        list(stream(model, memory, pieces, documents))
    first = 2 * T + 3
    assert torch.equal(found[0][:, first:], found[1][:, first:])
    assert not torch.allclose(found[0][:, first - 1], found[1][:, first - 1], atol=SEEN)
    assert current(memory).there().tolist() == [2 * T] * B  # all of the last document, half of it looked up


@torch.no_grad()
def test_without_a_document_mask_a_segment_that_begins_another_sees_no_memory() -> None:
    model, pieces = model_with(), pieces_of(4)
    documents = [torch.full((B, T), int(i == 3)) for i in range(4)]
    memory = memory_of(model, reset_on_bos=True)
    *_, last = stream(model, memory, pieces, documents)
    torch.testing.assert_close(last, model(pieces[3]), atol=ATOL, rtol=0)
    assert current(memory).there().tolist() == [T] * B


@torch.no_grad()
@pytest.mark.parametrize(
    "attention",
    [
        {"type": "gqa_fused", "qk_norm": "rms_full"},
        {"qk_norm": "rms_per_head", "value_mix": "residual", "value_dim": 4},
        {"kernel": "eager", "score": {"type": "elu", "normalize": True}, "sink": "none", "gate": "element"},
        {"registers": {"type": "learned", "n": 3}, "position": {"scaling": {"type": "lswt", "train_len": 8}}},
        {"position": {"frequencies": "learned", "scaling": {"type": "lswt", "train_len": 8}}},
    ],
    ids=str,
)
def test_with_other_parts_of_attention(attention: dict[str, Any]) -> None:
    """Made anew or remembered, keys and values are the same; and far ones are seen."""
    model, pieces = model_with(**attention), pieces_of(4)
    found = [
        torch.cat(
            list(stream(model, lanes(C, tables(2, **attention), model.summaries, **FAR, recompute_kv=anew), pieces)),
            1,
        )
        for anew in (False, True)
    ]
    torch.testing.assert_close(*found, atol=ATOL, rtol=0)
    near = torch.cat(list(stream(model, lanes(C, tables(2, **attention)), pieces)), dim=1)
    assert (near - found[0])[:, 2 * T :].abs().max() > SEEN


@torch.no_grad()
def test_scaling_counts_positions_not_keys() -> None:
    """Of a text of 1 + C + T positions, whatever is looked up: registers and keys grow alike."""
    registers = {"type": "learned", "n": 1}
    model = model_with(1, position={"scaling": {"type": "lswt", "train_len": 4}}, registers=registers)
    told: list[int] = []
    position = model.stack.blocks["0"].attention.position
    resting, frequencies = position.resting, position.scaling.frequencies
    position.resting = lambda k, length: (told.append(length), resting(k, length))[1]
    position.scaling.frequencies = lambda length, device: (told.append(length), frequencies(length, device))[1]
    list(stream(model, memory_of(model, 1), pieces_of(1)))
    assert set(told) == {1 + C + T}
    assert len(told) > 1


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_what_is_looked_up_teaches_matrices_where_it_is_made_anew() -> None:
    model, pieces, found = model_with(), pieces_of(4), []
    for options in ({}, {"recompute_kv": True}, {"recompute_kv": True, "retrieve": 0}):
        *_, last = stream(model, memory_of(model, **options), pieces)
        found.append(gradients(model, last.sin().sum()))
    kept, anew, near = (each["stack.blocks.1.attention.v.weight"] for each in found)
    assert not torch.allclose(kept, anew, atol=SEEN)
    assert not torch.allclose(near, anew, atol=SEEN)
    torch.testing.assert_close(*(each["stack.blocks.1.attention.q.weight"] for each in found[:2]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recompute_kv", [False, True])
def test_recomputed_and_compiled_blocks(recompute_kv: bool) -> None:
    attention = {"registers": {"type": "learned", "n": 2}, "masks": ["causal", "document"]}
    found = []
    for recomputed in (False, True):
        model = model_with(**attention)
        model.stack.train()
        if recomputed:
            apply_activation_checkpointing(model, ActivationCheckpoint(mode="full"))
            for block in model.stack.blocks.values():
                block.compile(backend="aot_eager", fullgraph=True)
        memory = memory_of(model, recompute_kv=recompute_kv, reset_on_bos=True)
        torch._dynamo.utils.counters.clear()
        logits = list(stream(model, memory, pieces_of(4)))
        if recomputed:
            # One graph serves every block and every segment, the first one, whose memory is empty, included.
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        loss = torch.cat(logits, dim=1).sin().sum()
        found.append([loss, *gradients(model, loss).values()])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_memory_has_no_gradient_and_its_own_storage() -> None:
    model = model_with()
    memory = memory_of(model)
    list(stream(model, memory, pieces_of(3)))
    state = memory.state(range(B))
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if name[0] in "v0s"} == {
        "valid": (B,),
        "0.k": (B, 2, N * S + C, 8),
        "0.v": (B, 2, N * S + C, 8),
        "summaries": (B, N + C // S, 32),
    }
    for tensor in (*state.values(), *current(memory).tensors().values()):
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# ---- decoding


@torch.no_grad()
@pytest.mark.parametrize(
    "position", [{"type": "rope", "direction": "reversed"}, {"scaling": {"type": "lswt", "train_len": 9}}]
)
def test_decoding_is_what_training_saw(position: dict[str, Any]) -> None:
    n_layers = 1 if "scaling" in position else 2  # keys of a second layer come from shorter texts
    model = model_with(n_layers, memory={"recompute_kv": True, "reset_on_bos": True}, position=position)
    text = tokens(5 * T, 1)
    memory = memory_of(model, n_layers, recompute_kv=True)
    whole = torch.cat(list(stream(model, memory, list(text.split(T, 1)))), dim=1)
    decoding = memory.decoding(T)
    assert decoding is not None
    found = []
    for length in (5, 1, 1, 1, T, 3, 5, 1, 7, 1, 1, 6):
        assert length <= decoding.room
        found.append(model(text[:, sum(x.shape[1] for x in found) :][:, :length], memory=decoding))
        decoding.advance(length)
    compared = range(T - 1, 5 * T, T) if "scaling" in position else range(5 * T)  # where all of the segment is there
    torch.testing.assert_close(torch.cat(found, dim=1)[:, list(compared)], whole[:, list(compared)], atol=ATOL, rtol=0)


def test_generation_goes_on_over_segments() -> None:
    """A prompt of more than two segments; every token is the likeliest of a stream over all before it."""
    model = model_with()
    with torch.no_grad():
        model.head.output.weight.mul_(50)
    text = tokens(2 * T + 3, 1)[0].tolist()
    memory = memory_of(model)
    greedy = list(
        generate(model, text, 12, Sampling(temperature=0), 0, torch.device("cpu"), VOCAB, memory=memory.decoding(T))
    )
    expected = list(text)
    with torch.no_grad():
        for _ in range(12):
            *whole, last = torch.tensor([expected]).split(T, dim=1)
            again = memory_of(model)
            for _ in stream(model, again, whole):
                pass
            padded = F.pad(last, (0, T - last.shape[1]))
            (logits,) = stream(model, again, [padded])
            expected.append(int(logits[0, last.shape[1] - 1].argmax()))
    assert greedy == expected[len(text) :]
    plain = list(generate(model, text, 12, Sampling(temperature=0), 0, torch.device("cpu"), VOCAB))
    assert plain != greedy


@pytest.mark.parametrize("options", [{}, {"recompute_kv": True}], ids=["keys", "inputs"])
def test_bytes_are_those_of_the_state(options: dict[str, Any]) -> None:
    memory = memory_of(model_with(), **options)
    assert memory.nbytes(B) == sum(tensor.nbytes for tensor in memory.state(range(B)).values())
    assert memory.nbytes(B) > B * (N * S + C) * 32 * 4
    assert lanes(C, tables(2)).nbytes(B) == B * (8 + 2 * 2 * 2 * C * 8 * 4)


@pytest.mark.parametrize("kind", ["gqa", "gqa_fused"])
def test_flops_count_keys_that_are_made_anew(kind: str) -> None:
    """Forward and the weights' gradient of (m S + C) / T more tokens, in both layers."""
    config = LongTerm.Config(**FAR, length=C, recompute_kv=True)
    assert config.anew(T) == (M * S + C) / T
    assert config.model_copy(update={"recompute_kv": False}).anew(T) == 0
    matrices = 2 * 32 * (16 + 16)  # keys and values of 2 heads of width 8, in 2 layers
    assert anew_flops_per_token(model_with(type=kind), config.anew(T)) == 2 * 2 * matrices * (M * S + C) // T


def test_flops_count_what_is_shown() -> None:
    config = LongTerm.Config(**FAR, length=C)
    assert config.keys(T) == M * S + C + T
    assert config.span(T) == 1 + C + T
    assert config.model_copy(update={"retrieve": 0}).span(T) == C + T
