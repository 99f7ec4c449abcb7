"""Data worker processes: they live exactly as long as their trainer and leave signals to it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

from titan_lite.run.signals import STOP_SIGNALS

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class WorkerInit:
    """Runs first in a worker. `parent`: the trainer's process id."""

    parent: int

    def __call__(self, worker_id: int) -> None:
        # A scheduler signals every process of a job: the trainer needs data until it has finished its step and saved.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != self.parent:  # it died before the kernel knew of the bond
            os._exit(1)
