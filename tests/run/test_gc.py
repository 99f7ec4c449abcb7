"""Garbage collection happens at the chosen steps and at no other time."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run.facts import run_facts, step_result
from titan_lite.run.gc import GarbageCollectionHook


@pytest.fixture(autouse=True)
def restore_gc() -> Iterator[None]:
    yield
    gc.enable()


class Node:
    def __init__(self) -> None:
        self.me = self


def test_cycles_are_freed_at_every_freq_th_step_only(tmp_path: Path) -> None:
    hook = GarbageCollectionHook(freq=5)
    hook.on_start(run_facts(tmp_path))
    freed = []
    for step in range(1, 16):
        alive = weakref.ref(Node())
        litter = [[None] for _ in range(5000)]  # enough to start an automatic collection
        del litter
        assert alive() is not None
        hook.on_step(step_result(step))
        if alive() is None:
            freed.append(step)
    assert freed == [5, 10, 15]


def test_automatic_collection_comes_back_at_the_end(tmp_path: Path) -> None:
    gc.enable()
    hook = GarbageCollectionHook(freq=5)
    hook.on_start(run_facts(tmp_path))
    assert not gc.isenabled()
    hook.on_end("completed")
    assert gc.isenabled()


def test_debug_collects_and_reports_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = GarbageCollectionHook(freq=5, debug=True)
    hook.on_start(run_facts(tmp_path))
    gc.collect()
    Node()
    with caplog.at_level(logging.INFO):
        hook.on_step(step_result(1))
        hook.on_step(step_result(2))
    first, second = (int(record.message.split()[1]) for record in caplog.records)
    assert first >= 1
    assert second == 0
