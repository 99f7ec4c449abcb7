"""A dump folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from titan_lite.config.errors import ConfigError, show

LOCK = "run.lock"


class RunLock:
    """A POSIX record lock on `<dump_folder>/run.lock`, held from construction to `release` (rank 0, all the run).

    The kernel drops it when the process ends, however it ends; forked workers do not inherit it. A second writer gets a
    ConfigError with the holder's process and host. Record locks are per process and end with the first close of the
    file, so the process itself remembers what it holds.
    """

    held: ClassVar[set[Path]] = set()

    def __init__(self, dump_folder: Path) -> None:
        try:
            dump_folder.mkdir(parents=True, exist_ok=True)
            self.path = dump_folder.resolve() / LOCK
            if self.path in self.held:
                raise self._taken(f"pid {os.getpid()} on {socket.gethostname()}, this very process")
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            why = f"is no folder that can be written to: {error.strerror}"
            raise ConfigError.at("job.dump_folder", why, value=str(dump_folder)) from None
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.fd, 200, 0).decode(errors="replace").strip()
            os.close(self.fd)
            raise self._taken(show(holder)[1:-1] or "an unknown process") from None
        self.held.add(self.path)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _taken(self, holder: str) -> ConfigError:
        why = f"another run is writing to this folder ({holder})"
        return ConfigError.at(
            "job.dump_folder", why, value=str(self.path.parent), allowed="one run at a time in a dump folder"
        )

    def release(self) -> None:
        if self.path in self.held:
            self.held.remove(self.path)
            os.close(self.fd)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
