"""What iterating is for: a trained core ends at the same place from wherever it starts. Source: arXiv 2502.05171."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.tiny import tiny_model
from titan_lite.models.context import Iterations, TrainingFacts
from titan_lite.models.dropout import Noise
from titan_lite.models.transformer import Transformer

CPU = torch.device("cpu")
MEAN, STEPS, ROWS, T, BASE = 8, 100, 16, 16, 16


def sums(index: int) -> Tensor:
    """(ROWS, T + 1): two digits, then each the sum of the two before it."""
    digits = torch.randint(BASE, (ROWS, 2), generator=torch.Generator().manual_seed(index))
    for i in range(T - 1):
        digits = torch.cat((digits, digits[:, i : i + 2].sum(dim=1, keepdim=True) % BASE), dim=1)
    return digits


def logits(model: Transformer, tokens: Tensor, start: int, iterations: Iterations) -> Tensor:
    """From the initial state that step `start` draws."""
    noise = Noise.of(0, CPU, start, torch.arange(ROWS))
    return model(tokens[:, :-1], facts=TrainingFacts(noise=noise, iterations=iterations))


def mean_loss(model: Transformer, tokens: Tensor, start: int, iterations: Iterations) -> Tensor:
    """Where the next digit follows: behind the two first ones."""
    return F.cross_entropy(logits(model, tokens, start, iterations)[:, 1:].flatten(0, 1), tokens[:, 2:].flatten())


@pytest.fixture(scope="module")
def trained() -> Transformer:
    stack = {"type": "recurrent", "mean_iterations": MEAN, "backprop_iterations": 4}
    model = tiny_model(residual="sandwich_sum", n_layers=3, stack=stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for index in range(STEPS):
        drawn = model.stack.iterations(0, index)
        assert drawn is not None
        mean_loss(model, sums(index), index, drawn).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_more_iterations_help_up_to_the_mean(trained: Transformer):
    with torch.no_grad():
        losses = [mean_loss(trained, sums(STEPS), STEPS, Iterations(n, 0)).item() for n in (1, 2, MEAN)]
    assert losses == sorted(losses, reverse=True)


def test_starts_meet(trained: Transformer):
    """Two initial states agree on more tokens, and their distributions come closer, the longer the core iterates."""
    tokens = sums(STEPS)
    agreement, distance = [], []
    with torch.no_grad():
        for n in (1, MEAN, 4 * MEAN):
            one, other = (logits(trained, tokens, start, Iterations(n, 0)).softmax(-1) for start in (0, 1))
            agreement.append((one.argmax(-1) == other.argmax(-1)).float().mean().item())
            distance.append((one - other).abs().sum(-1).mean().item())
    assert agreement == sorted(agreement)
    assert agreement[-1] > agreement[0]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < distance[0] / 10
