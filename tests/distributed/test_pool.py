"""The pool itself: results by rank, failures named, hangs killed, and a fresh start after each."""

from __future__ import annotations

import os
import signal
import time

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


def kill_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def test_results_come_by_rank_and_processes_are_reused(pool2: WorkerPool) -> None:
    assert [(rank, total.tolist()) for rank, total in pool2.run(rank_sum, torch.tensor([1.0, 2.0]))] == [
        (0, [3.0, 6.0]),
        (1, [3.0, 6.0]),
    ]
    pids = pool2.run("tests.distributed.test_pool:process_id")
    assert len(set(pids)) == 2
    assert pool2.run(process_id) == pids


@pytest.mark.parametrize(
    ("fn", "timeout", "message"),
    [
        (raise_on_rank_one, 60.0, "rank one objects"),
        (kill_rank_one, 60.0, "exit code -9"),
        (hang, 1.0, "no result within 1 s"),
    ],
)
def test_a_failure_is_named(fn, timeout: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.distributed.pool.SETTLE_SECONDS", 0.2)
    pool = WorkerPool(2)
    try:
        with pytest.raises(AssertionError, match=message):
            pool.run(fn, timeout=timeout)
        if fn is hang:
            assert len(set(pool.run(process_id))) == 2
    finally:
        pool.close()


def test_a_function_without_a_name_is_refused(pool2: WorkerPool) -> None:
    with pytest.raises(AssertionError, match="not a module-level function"):
        pool2.run(lambda: None)
