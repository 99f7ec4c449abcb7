"""Streams of arrays made in worker processes, through torchdata's StatefulDataLoader."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from titan_lite.config.errors import ConfigError
from titan_lite.data.worker import WorkerInit

OpenPart = Callable[[int], Iterator[Any]]
"""Opens the stream of part 0, 1, ..., n - 1. Must pickle where processes are not forked."""


class LoaderSettings(Protocol):
    """[training.dataloader] and [validation.dataloader]."""

    @property
    def num_workers(self) -> int: ...
    @property
    def persistent_workers(self) -> bool: ...
    @property
    def pin_memory(self) -> bool: ...
    @property
    def prefetch_factor(self) -> int | None: ...


class Background(Iterator[Any]):
    """Items of the parts in turn: the first of part 0, of part 1, ..., the second of part 0, ...

    Each part is made in a worker process of its own; with num_workers = 0 the one part is made in this process.
    """

    def __init__(self, open_part: OpenPart, n_parts: int, settings: LoaderSettings) -> None:
        assert settings.num_workers or n_parts == 1
        self._items: Iterator[Any] = iter(loader(_Parts(open_part), n_parts, settings))
        self._workers = list(getattr(self._items, "_workers", ()))
        if self._workers:
            atexit.register(self.close)

    def __next__(self) -> Any:
        item = next(self._items)
        if isinstance(item, ConfigError):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Ends the worker processes; they hold nothing that would be lost."""
        atexit.unregister(self.close)
        items, self._items = self._items, iter(())
        workers, self._workers = self._workers, []
        if workers:
            items._shutdown_workers()  # type: ignore[attr-defined]
        for worker in workers:
            worker.kill()  # one that is in the middle of a slow read; it ignores the gentler request


class _Parts(IterableDataset[Any]):
    """The part of whichever worker this is iterated in."""

    def __init__(self, open_part: OpenPart) -> None:
        self.open_part = open_part

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        try:
            yield from self.open_part(worker.id if worker else 0)
        except ConfigError as error:
            yield error  # raised in a worker it would lose its type and gain a traceback


def loader(dataset: _Parts, n_parts: int, settings: LoaderSettings) -> Any:
    """The StatefulDataLoader; the state of a stream travels with its items, so its own snapshots are not needed."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    n_workers = n_parts if settings.num_workers else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=n_workers,
            worker_init_fn=WorkerInit(os.getpid()),
            multiprocessing_context="fork" if n_workers and sys.platform == "linux" else None,
            persistent_workers=settings.persistent_workers,
            prefetch_factor=settings.prefetch_factor,
            snapshot_every_n_steps=sys.maxsize,
        )


def _as_it_is(item: Any) -> Any:
    """NumPy arrays cross the process border in the pipe; tensors would need a file descriptor each."""
    return item
