"""Stop requests, and the bond between a worker and its launcher. Standard library only: called before torch loads.

A worker's first lines are `die_with_parent()` and `stop = StopFlag().install()`. Until then the four signals
are blocked (the launcher starts it that way), so that one that arrives early waits instead of killing it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from titan_lite.run.environment import LAUNCHER_PID

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""A request to save and stop: Ctrl-C, a scheduler's termination, and the two warnings schedulers send ahead of it."""

EXIT_STOPPED = 75
"""Exit code (sysexits' EX_TEMPFAIL) of a run that stopped on a signal after saving: start it again to go on."""

SAME_REQUEST_SECONDS = 1.0
"""One request often arrives twice: a scheduler signals every process of a step, and the launcher forwards its own."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Makes the kernel kill this process when its parent dies, whatever the parent dies of.

    `parent` is the pid of the process that started this one; default the launcher's, and nothing happens without a
    launcher. The kernel means the thread that started this process: it must live as long as its process.
    """
    if parent is None:
        if LAUNCHER_PID not in os.environ:
            return
        parent = int(os.environ[LAUNCHER_PID])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True, name="watch-parent").start()
    if os.getppid() != parent:  # it died before the kernel knew of the bond
        os._exit(1)


def _watch_parent(parent: int) -> None:
    """Where the kernel offers no bond: an orphan's parent id changes, which a look every second notices."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


class StopFlag:
    """Remembers that this process was asked to stop; the training loop looks at it between steps.

    The first signal only sets the flag. The same one again, `SAME_REQUEST_SECONDS` or more later, means "now": exit
    with code 1. Another kind does not hurry: a scheduler's SIGTERM follows its SIGUSR1 while the checkpoint is written.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._owner = os.getpid()
        self._asked: dict[int, float] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def install(self) -> StopFlag:
        """Takes over the four signals (main thread only) and lets in those that have been waiting."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._receive_in_child(number)
            return
        now = time.monotonic()
        first = self._asked.setdefault(number, now)
        if now - first >= SAME_REQUEST_SECONDS:
            os._exit(1)
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name

    def _receive_in_child(self, number: int) -> None:
        """A forked child (a data worker) inherits the handlers: SIGTERM ends it as usual, the rest is not for it."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
