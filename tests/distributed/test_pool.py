"""The pool itself: results by rank, failures named, hangs killed, and a fresh start after each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import WorkerPool


def rank_sum(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total


def process_id() -> int:
    return os.getpid()


def raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one objects")
    dist.barrier()


def hang() -> None:
    time.sleep(1000)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_by_rank_and_processes_are_reused(pool2: WorkerPool) -> None:
    assert [(rank, total.tolist()) for rank, total in pool2.run(rank_sum, torch.tensor([1.0, 2.0]))] == [
        (0, [3.0, 6.0]),
        (1, [3.0, 6.0]),
    ]
    pids = pool2.run("tests.distributed.test_pool:process_id")
    assert len(set(pids)) == 2
    assert pool2.run(process_id) == pids


def test_a_raising_rank_is_named_and_leaves_a_usable_pool(pool2: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.distributed.pool.SETTLE_SECONDS", 0.2)
    with pytest.raises(AssertionError, match="rank one objects"):
        pool2.run(raise_on_rank_one)
    assert len(set(pool2.run(process_id))) == 2


@pytest.mark.parametrize(
    ("fn", "timeout", "message"), [(die, 60.0, "exit code -9"), (hang, 1.0, "no result within 1 s")]
)
def test_death_and_hanging_end_the_test_not_the_suite(fn: Callable[[], None], timeout: float, message: str) -> None:
    pool = WorkerPool(1)
    try:
        with pytest.raises(AssertionError, match=message):
            pool.run(fn, timeout=timeout)
    finally:
        pool.close()


def test_a_function_without_a_name_is_refused(pool2: WorkerPool) -> None:
    with pytest.raises(AssertionError, match="not a module-level function"):
        pool2.run(lambda: None)
