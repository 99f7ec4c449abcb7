"""The kernel that is chosen for an attention and a device, and that choosing changes nothing of what is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.models.attention.cases import MASKS
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache
from titan_lite.models.attention.kernel import SDPA, Auto, Eager, Flex
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.activation import apply_activation_checkpointing
from titan_lite.parallel.config import ActivationCheckpoint
from titan_lite.run.facts import attention_kernels

ATOL = 1e-5
"""fp32, two layers."""
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WIDE = {"n_heads": 2, "n_kv_heads": 1}
"""Heads of the width that FlexAttention wants on CUDA."""
LONG_WINDOW = ["causal", {"type": "sliding_window", "window": 4096}]

CHOICES: dict[str, tuple[dict[str, Any], str, str]] = {
    "causal": ({}, "sdpa", "sdpa"),
    "window": ({"masks": MASKS["window"]}, "sdpa", "flex"),
    "a window that hides nothing": ({"masks": LONG_WINDOW}, "sdpa", "sdpa"),
    "documents": ({"masks": MASKS["document"]}, "sdpa", "flex"),
    "alibi": ({"position": "alibi"}, "sdpa", "flex"),
    "registers": ({"registers": {"type": "learned", "n": 2}, "position": "none"}, "sdpa", "flex"),
    "cap": ({"score": "softmax_capped"}, "eager", "flex"),
    "sink": ({"sink": "logit"}, "eager", "flex"),
    "what flex does not compute": ({"masks": MASKS["window"], "score": "elu"}, "eager", "eager"),
    "dropped weights": ({"dropout": 0.1}, "eager", "eager"),
}


@pytest.mark.parametrize(("attention", "on_cpu", "on_cuda"), CHOICES.values(), ids=CHOICES)
def test_what_is_chosen(attention: dict[str, Any], on_cpu: str, on_cuda: str) -> None:
    model = tiny_model(attention=WIDE | attention)
    assert attention_kernels(model, CPU, 1024, 1024) == on_cpu
    assert attention_kernels(model, CUDA, 1024, 1024) == on_cuda
    assert attention_kernels(model, CUDA, 128, 128) == on_cpu  # one block
    # Beside a memory, torch's own causal mask is not all there is to do.
    assert attention_kernels(model, CUDA, 1024, 2048) == ("flex" if on_cuda == "sdpa" else on_cuda)


def test_heads_too_narrow_for_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    narrow = tiny_model(attention={"n_heads": 4, "masks": MASKS["window"]})
    assert attention_kernels(narrow, CUDA, 1024, 1024) == "sdpa"


def test_layers_choose_for_themselves() -> None:
    layers = [{"at": -1, "attention": {"masks": ["causal"]}}]
    model = tiny_model(n_layers=3, attention=WIDE | {"masks": MASKS["window"]}, layers=layers)
    assert attention_kernels(model, CUDA, 1024, 1024) == "flex x 2, sdpa x 1"
    assert attention_kernels(model, CPU, 1024, 1024) == "sdpa"


def tokens_and_documents(length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (2, length), generator=generator), (torch.arange(length).expand(2, -1) // 7).int()


def results(model: Transformer) -> list[torch.Tensor]:
    tokens, documents = tokens_and_documents()
    loss = model(tokens, documents).sin().sum()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(("attention", "on_cpu", "on_cuda"), CHOICES.values(), ids=CHOICES)
def test_on_a_cpu_nothing_else_is_computed(attention: dict[str, Any], on_cpu: str, on_cuda: str) -> None:
    named = tiny_model(attention=WIDE | attention | {"kernel": on_cpu})
    chosen = tiny_model(attention=WIDE | attention)
    assert named.state_dict().keys() == chosen.state_dict().keys()
    assert all(map(torch.equal, results(chosen), results(named)))


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto takes the kernel that it would take on CUDA, for more than 8 keys; FlexAttention trains (test only)."""
    skips = Auto._skips
    monkeypatch.setattr(Auto, "_skips", lambda self, device, *sizes: skips(self, CUDA, *sizes))
    monkeypatch.setattr("titan_lite.models.attention.kernel.auto.BLOCK", 8)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_and_recomputed() -> None:
    """A layer with FlexAttention and a sink before one with SDPA, against the kernels for any device."""
    attention = WIDE | {"masks": MASKS["window and document"], "sink": "logit"}
    layers = [{"at": 1, "attention": {"masks": ["causal"], "sink": "none"}}]
    expected = results(tiny_model(attention=attention | {"kernel": "eager"}, layers=layers))
    chosen = tiny_model(attention=attention, layers=layers)
    apply_activation_checkpointing(chosen, ActivationCheckpoint(mode="full"))
    for block in chosen.stack.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(chosen), expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name, (*_, on_cuda) in CHOICES.items() if on_cuda == "flex"])
def test_the_other_kernel_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, on_cpu, _ = CHOICES[name]
    named = tiny_model(attention=WIDE | attention | {"kernel": on_cpu})
    chosen = tiny_model(attention=WIDE | attention)
    calls: Counter[type] = Counter()
    for kernel in (SDPA, Eager, Flex):
        prepare = kernel.prepare
        monkeypatch.setattr(
            kernel,
            "prepare",
            lambda self, context, prepare=prepare: calls.update([type(self)]) or prepare(self, context),
        )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        tokens, documents = tokens_and_documents()
        logits = chosen(tokens, documents)
        assert calls == {Flex: 1}
        torch.testing.assert_close(logits, named(tokens, documents), atol=ATOL, rtol=0)
        calls.clear()
        # In decoding, the kernel for any device.
        cache = KVCache(20)
        for piece in tokens.split([15, 1, 4], dim=1):
            logits = chosen(piece, memory=cache)
            cache.advance(piece.shape[1])
        assert calls == {type(chosen.stack.blocks["0"].attention.kernel.plain): 3}
        torch.testing.assert_close(logits, named(tokens)[:, -4:], atol=ATOL, rtol=0)
