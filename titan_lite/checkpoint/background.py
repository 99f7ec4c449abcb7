"""One job at a time on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs a job behind the training loop.

    The thread is a daemon: a process that has to end does not wait for it, and an unfinished save is a temporary folder
    that nobody lists.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Starts `job`; the last one must have been joined."""
        assert self.thread is None, "a job is still running"
        self.error = None
        self.thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.error = error

    def idle(self) -> bool:
        """Whether no job runs (any more)."""
        return self.thread is None or not self.thread.is_alive()

    def join(self) -> None:
        """Waits for the job, if there is one, and raises what it has raised."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
