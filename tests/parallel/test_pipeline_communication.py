"""What pipeline ranks send each other in a run of the schedule is what theory says, and nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_pipeline import RUN, TP, piped
from titan_lite.step import mean_loss

B, T, D, MICRO_BATCHES = 1, twins.T, 32, 4


class Messages(TorchDispatchMode):
    """Counts messages between two ranks, and their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if func.namespace == "c10d" and name in ("send", "recv_"):
            self.counts[name] += 1
            sent = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.elements[name] += sum(tensor.numel() for tensor in sent)
        return func(*args, **(kwargs or {}))


def of_a_run(sections: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    training = twins.built(sections)
    rows = twins.micro_batches(training, 0)[:RUN]

    def loss(index: int) -> Any:
        return lambda model: mean_loss(twins.replace(training, model=model), rows[index], 1.0, 0)

    with Messages() as found:
        training.world.forward_backward(training.model, [loss(i) for i in range(len(rows))], last=len(rows) - 1)
    return dict(found.counts), dict(found.elements)


RANK_OF = {
    "GPipe": [0, 1],
    "1F1B": [0, 1],
    "Interleaved1F1B": [0, 1, 0, 1],
    "InterleavedZeroBubble": [0, 1, 0, 1],
    "LoopedBFS": [0, 1, 0, 1],
    "ZBVZeroBubble": [0, 1, 1, 0],
    "DualPipeV": [0, 1, 1, 0],
}
"""The rank of each stage; every stage but the last of four has a layer, so that values cross all borders."""


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("schedule", RANK_OF)
def test_messages(pool2: WorkerPool, schedule: str, values: bool) -> None:
    model = {"attention": {"value_mix": "residual"}} if values else {}
    n = sum(one != other for one, other in pairwise(RANK_OF[schedule]))
    for counts, elements in pool2.run(
        of_a_run, piped({"pipeline_parallel_schedule": schedule}, model=model), timeout=200
    ):
        # Over each border between two ranks goes every micro-batch's stream one way, its gradient the other way, and
        # beside them the first layer's values: two heads of four, and so half as wide.
        messages = MICRO_BATCHES * n * (1 + values)
        assert counts == {"send": messages, "recv_": messages}
        total = MICRO_BATCHES * n * B * T * (D + values * D // 2)
        assert elements == {"send": total, "recv_": total}


def test_tensor_parallel_ranks_send_their_part(pool4: WorkerPool) -> None:
    for counts, elements in pool4.run(of_a_run, piped(TP), timeout=200):
        assert counts == {"send": MICRO_BATCHES, "recv_": MICRO_BATCHES}
        assert elements == {"send": MICRO_BATCHES * B * T * D // 2, "recv_": MICRO_BATCHES * B * T * D // 2}
