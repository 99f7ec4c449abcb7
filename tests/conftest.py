"""Fixtures and environment of the whole suite: one thread per process, no network."""

from __future__ import annotations

import os

# Before anything imports torch or a Hugging Face library.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool


def _pool(n: int) -> Iterator[WorkerPool]:
    pool = WorkerPool(n)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool2() -> Iterator[WorkerPool]:
    """Two gloo ranks; started by the first test that runs something on them."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool4() -> Iterator[WorkerPool]:
    """Four gloo ranks; started by the first test that runs something on them."""
    yield from _pool(4)


@pytest.fixture(scope="module")
def cpu_alone() -> Iterator[None]:
    """Models run on the CPU, so configs are judged as on a machine without CUDA."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture(scope="module")
def level_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that levels of `tests/combinations` read their files from."""
    from tests.combinations.factors import write_files

    path = tmp_path_factory.mktemp("files")
    write_files(path)
    return path


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """The same random numbers whatever ran before, and no graphs of other tests.

    torch.compile keeps the graphs of a function for all models of a process, and gives up when they are many.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
