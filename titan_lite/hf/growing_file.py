"""A file that is written from front to back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Final

from titan_lite.checkpoint.folder import refuse
from titan_lite.checkpoint.manifest import open_regular
from titan_lite.hf.background import meanwhile
from titan_lite.hf.source import Place

COPY: Final = 32 * 2**20
"""Bytes that the kernel is asked to copy at a time."""
COPIES: Final = sys.platform == "linux"
"""Whether the kernel copies from file to file, without a detour through this process."""
PAGE: Final = 4096
"""Bytes: what the kernel copies as a whole where both files have it at the same place of theirs."""


class GrowingFile:
    """A new file; once it is left without an exception, `durable` waits for the disk. OSError where that fails."""

    durable: Future[None]

    def __init__(self, path: Path, see: Callable[[memoryview], None] | None = None):
        """`see` gets all that is written, in order, for a checksum."""
        self._see = see
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: memoryview) -> None:
        """Appends the data."""
        if self._see is not None:
            self._see(data)
        while data:  # the kernel may take less than it was given
            data = data[os.write(self._fd, data) :]

    def copy(self, place: Place) -> None:
        """Appends the bytes of a tensor in a step folder, where `COPIES`. ConfigError where its file ends too early."""
        at, end = place.start, place.start + place.nbytes
        with open_regular(place.path) as file:
            while at < end:
                copied = os.sendfile(self._fd, file.fileno(), at, min(end - at, COPY))
                if copied == 0:
                    raise refuse(place.path, "the tensors cannot be read: the file ended early")
                at += copied

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.durable = meanwhile(self._close)
        else:
            os.close(self._fd)

    def _close(self) -> None:
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
