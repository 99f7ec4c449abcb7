"""One training step calls the ATen ops of a hand-written one and, beyond them, only those named here with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from benchmarks.measure import DispatchedOps, difference
from benchmarks.minimal import Loop, PlainTransformer, mean_loss
from tests.runs import VOCAB, build_tiny, global_batch
from titan_lite.step import Training, step

LAYERS = 4
SECTIONS = {
    "model": {"name": "llama3", "flavor": "debugmodel"},
    "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
}
PLAIN = (VOCAB, 128, LAYERS, 8, 4, 384, 16, 500_000.0)
"""The same, as `PlainTransformer` wants it."""

OF_THE_STEP: dict[str, dict[str, int]] = {
    "sum of the losses of the step's micro-batches": {"zeros": 1, "add_": 1},
    "mean over the global batch, forward and backward": {"div": 2},
    "tokens flattened before the head, not after": {"view": -3, "_unsafe_view": -1},
}

OF_THE_MODEL: dict[str, dict[str, int]] = {
    "positions, and as float32": {"arange": 1, "_to_copy": 1},
    "rotation frequencies theta^-(2j/Dh)": {"arange": 1, "div": 1, "neg": 1, "pow": 1},
    "rotation angles, once per forward": {"view": 1, "mul": 1, "cos": 1, "sin": 1},
}


def total(*tables: dict[str, dict[str, int]]) -> dict[str, int]:
    """All the counts of `tables`, under the ops' full names."""
    counts: Counter[str] = Counter()
    for table in tables:
        for extra in table.values():
            counts.update(extra)
    return {f"aten.{name}": count for name, count in sorted(counts.items())}


def counted(work: Callable[[], torch.Tensor]) -> tuple[Counter[str], float]:
    """The ops that `work` calls, and the number it returns."""
    counter = DispatchedOps()
    counter.start()
    result = work()
    return counter.stop(), result.item()


def hand_written(training: Training, plain: bool) -> Loop:
    """The loop over the trainer's model, or over a plain one with the same weights."""
    lr, max_norm = training.peak_lr, training.max_norm
    if plain:
        model = PlainTransformer(*PLAIN).copy_weights(training.model)
        return Loop(model, lambda tokens, targets: mean_loss(model(tokens), targets), lr, max_norm)
    return Loop(training.model, lambda tokens, targets: mean_loss(training.model(tokens), targets), lr, max_norm)


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        pytest.param(False, total(OF_THE_STEP), id="same-model"),
        pytest.param(True, total(OF_THE_STEP, OF_THE_MODEL), id="plain-model"),
    ],
)
def test_ops_of_a_step(plain: bool, expected: dict[str, int]) -> None:
    _, training = build_tiny(SECTIONS)
    loop = hand_written(build_tiny(SECTIONS)[1], plain)
    batches = [global_batch(index) for index in range(2)]
    n_tokens = [(batch.targets != -100).sum().item() for batch in batches]
    # The first step is not like the others: the optimizer makes its state.
    step(training, batches[:1], n_tokens[0], 0)
    loop.step(batches[0].tokens, batches[0].targets)
    our_ops, our_loss = counted(lambda: step(training, batches[1:], n_tokens[1], 1).loss)
    their_ops, their_loss = counted(lambda: loop.step(batches[1].tokens, batches[1].targets))
    assert our_loss == pytest.approx(their_loss, abs=1e-6)
    assert their_ops["aten.mm"] > 7 * LAYERS  # the counter sees forward and backward
    assert difference(our_ops, their_ops) == expected


def graph_ops(module: nn.Module, *args: object) -> Counter[str]:
    """The ops in the compiled forward and backward graphs of a block."""
    ops: Counter[str] = Counter()

    def count(graph: GraphModule, _: object) -> Callable[..., object]:
        ops.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    out = compiled(*args)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    return ops


def test_compiled_block() -> None:
    """The compiled graphs of a block made of slots are those of a block written as one class."""
    model = build_tiny(SECTIONS)[1].model
    plain = PlainTransformer(*PLAIN).copy_weights(model)
    x = torch.randn(2, 16, 128, requires_grad=True)
    context = model.context(torch.zeros(2, 16, dtype=torch.long))
    ours = graph_ops(model.stack.blocks["0"], x, context)
    theirs = graph_ops(plain.blocks[0], x, plain.cos, plain.sin)
    assert ours["aten.mm.default"] == 3 * 7  # forward, and two products backward, for each matrix
    assert ours == theirs
