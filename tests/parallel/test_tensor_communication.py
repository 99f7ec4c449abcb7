"""What ranks send each other in a step is what theory says, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from titan_lite.step import mean_loss


class Collectives(TorchDispatchMode):
    """Counts them and the elements of their results: those of tensor parallelism are functional, FSDP's are not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # what it does inside comes here too
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func._opname and "wrap" not in func._opname:
            name = f"{'tp' if func.namespace == '_c10d_functional' else 'dp'} {func._opname}"
            self.counts[name] += 1
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.elements[name] += sum(tensor.numel() for tensor in tensors)
        return result


def of_a_micro_batch(parallelism: dict[str, int], chunk: int) -> tuple[dict[str, int], dict[str, int]]:
    tables = {
        "model": {"name": "llama3", "flavor": "debugmodel", "vocab_size": twins.VOCAB},
        "training": {"seq_len": twins.T, "mixed_precision_param": "float32", "loss_chunk_tokens": chunk},
        "tokenizer": {"type": "bytes"},
        "activation_checkpoint": {"mode": "none"},
        "parallelism": parallelism,
    }
    training = twins.built(tables)
    with Collectives() as found:
        training.world.forward_backward(
            training.model, [lambda _: mean_loss(training, twins.share(training, 0), 1.0, 0)], last=0
        )
    return dict(found.counts), dict(found.elements)


@pytest.mark.parametrize("chunk", [0, 16])
def test_tensor_parallel_collectives(pool2: WorkerPool, chunk: int) -> None:
    L, D, tokens = 4, 128, twins.ROWS * twins.T
    for counts, elements in pool2.run(of_a_micro_batch, {"tensor_parallel_degree": 2}, chunk, timeout=200):
        of_tp = {name.removeprefix("tp "): n for name, n in counts.items() if name.startswith("tp")}
        chunks = tokens // chunk if chunk else 1
        assert of_tp == {
            # Forward: before both branches of each block and before the head. Backward: behind both, and the embedding.
            "all_gather_into_tensor": (2 * L + 1) + (2 * L + 1),
            # Forward: behind both branches of each block and the embedding. Backward: before both and the head.
            "reduce_scatter_tensor": (2 * L + 1) + (2 * L + 1),
            # The loss: the largest logit, then sum and target's logit. Gradients of two norms a block and of the last.
            "all_reduce": 2 * chunks + (2 * L + 1),
        }
        assert elements["tp all_gather_into_tensor"] == (4 * L + 2) * tokens * D
        assert elements["tp reduce_scatter_tensor"] == (4 * L + 2) * tokens * D // 2
        assert elements["tp all_reduce"] == 3 * tokens + (2 * L + 1) * D


def test_data_parallel_collectives_are_those_without_tensor_parallelism(pool2: WorkerPool, pool4: WorkerPool) -> None:
    (alone, *_), (both, *_) = (
        pool.run(of_a_micro_batch, parallelism, 0, timeout=200)
        for pool, parallelism in ((pool2, {}), (pool4, {"tensor_parallel_degree": 2}))
    )
    of_dp = {name: n for name, n in both[0].items() if name.startswith("dp")}
    assert of_dp == alone[0]
    assert of_dp
