"""The launcher's ear: one thread waits for the stop signals and passes them to the workers.

The signals are blocked in every thread and waited for, instead of handled: a request is then answered at once even
while the main thread sits in a library call (a rendezvous waits minutes for the other nodes).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

from titan_lite.run.signals import EXIT_STOPPED, SAME_REQUEST_SECONDS, STOP_SIGNALS

GRACE_SECONDS = 30 * 60.0
"""How long the workers may take to finish their step and save; schedulers have their own, shorter, patience."""


def say(text: str) -> None:
    """One message of the launcher to the user."""
    print(f"titan_lite: {text}", file=sys.stderr, flush=True)


class SignalRelay:
    """Forwards stop signals. `killed` says why the workers were killed instead of being waited for, or is empty."""

    def __init__(self) -> None:
        self.killed = ""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._asked: dict[int, float] = {}
        self._lock = threading.Lock()

    def listen(self) -> SignalRelay:
        """Call in the main thread before any other thread exists: the signals must be blocked in all of them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()
        return self

    def attach(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """From now on signals go to these; until then one ends the launcher, which has nothing to save."""
        with self._lock:
            self._processes = processes

    def enforce_grace(self) -> None:
        """Kills workers that were asked to stop more than `GRACE_SECONDS` ago."""
        with self._lock:
            if self._asked and time.monotonic() - min(self._asked.values()) > GRACE_SECONDS:
                self._kill(f"the workers had not stopped {GRACE_SECONDS / 60:g} minutes after the signal")

    def _listen(self) -> None:
        while True:
            self._receive(signal.sigwait(STOP_SIGNALS))

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        with self._lock:
            if not self._processes:
                say(f"{name}: stopped before any worker was running")
                os._exit(EXIT_STOPPED)  # workers that are just being started die with this process
            now = time.monotonic()
            if number in self._asked:
                if now - self._asked[number] >= SAME_REQUEST_SECONDS:
                    self._kill(f"a second {name}")
                return
            if not self._asked:
                limit = f"{GRACE_SECONDS / 60:g} minutes"
                say(f"{name}: the workers finish the step, save and stop (within {limit}; again: stop at once)")
            self._asked[number] = now
            for process in self._processes:
                process.send_signal(number)

    def _kill(self, why: str) -> None:
        self.killed = self.killed or why
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
