"""Mistakes that data parallelism invites, each of which the comparison with one process notices."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

from tests.distributed.pool import WorkerPool
from tests.parallel import twins
from tests.parallel.test_tensor import tables
from titan_lite.parallel import fsdp

DDP = {"data_parallel_replicate_degree": 2}
step_of, shard = twins.step, fsdp.fully_shard
divide, reduce = FSDPModule.set_gradient_divide_factor, FSDPModule.set_requires_all_reduce


def _nothing_sharded(module: Any, **options: Any) -> Any:
    """FSDP that leaves every parameter as it is, on every rank. (Of some alone, torch's clipping already complains.)"""
    return shard(module, ignored_params=set(module.parameters()), **options)


def broken(sections: dict[str, Any], mutant: str) -> twins.Steps:
    with pytest.MonkeyPatch.context() as patch:
        if mutant == "parameters are left replicated":
            patch.setattr(fsdp, "fully_shard", _nothing_sharded)
        if mutant == "gradients are averaged":
            patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: divide(self, 2.0))
        if mutant == "replicas are not summed":
            patch.setattr(FSDPModule, "set_requires_all_reduce", lambda self, needed: reduce(self, False))
        if mutant == "the loss counts the tokens of one rank":
            patch.setattr(twins, "step", lambda training, rows, n, i: step_of(training, rows, n / 2, i))
        return twins.steps(sections, 1)


@pytest.mark.parametrize(
    ("mutant", "parallelism"),
    [
        ("parameters are left replicated", {}),
        ("gradients are averaged", {}),
        ("replicas are not summed", DDP),
        ("the loss counts the tokens of one rank", {}),
    ],
)
def test_mutants_differ(mutant: str, parallelism: dict[str, Any], pool2: WorkerPool) -> None:
    one = twins.steps(tables(), 1)
    assert not twins.differences(one, pool2.run(broken, tables(parallelism=parallelism), "none", timeout=200)[0])
    assert twins.differences(one, pool2.run(broken, tables(parallelism=parallelism), mutant, timeout=200)[0])
