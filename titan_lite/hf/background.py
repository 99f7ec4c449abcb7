"""Work that a thread does beside the caller's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def meanwhile(function: Callable[..., T], *args: Any) -> Future[T]:
    """What the function returns or raises, once its own thread is done; the process does not wait for it to end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
