"""The workers of one node under torch's elastic agent: start, watch, stop, and one exit code for all of them.

`SimpleElasticAgent` supplies the rendezvous of the nodes, the ranks and the watching loop. Unlike its stock subclass
this agent passes exit codes through, lets ranks that are still saving finish when one has exited, forwards signals
instead of dying of them, names the first failure in one line, and starts workers that cannot outlive it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch.distributed import FileStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from titan_lite.config.errors import ConfigError
from titan_lite.relay import SignalRelay, say
from titan_lite.run.environment import LAUNCHER_PID
from titan_lite.run.signals import EXIT_STOPPED

SETTLE_SECONDS = 2.0
"""How long the other ranks may go on after the first failure: most notice it at once and have something to print."""

TAIL_BYTES = 4000
"""How much of a hidden rank's log is shown when it is the one that failed."""


class FileRendezvous(RendezvousHandler):
    """The meeting of a single node with itself, over a file: nothing listens on any port."""

    def __init__(self, folder: Path) -> None:
        self._store = FileStore(str(folder / "agent"), 1)

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("localhost", 0))

    def get_backend(self) -> str:
        return "file"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "titan_lite"

    def shutdown(self) -> bool:
        return True

    @property
    def use_agent_store(self) -> bool:
        return False


@dataclass
class LocalWorker:
    """One worker process and how it ended: Popen's code (negative: killed by that signal) and the monotonic time."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    code: int | None = None
    ended: float = 0.0

    def wait(self) -> None:
        """Runs in a thread of its own, so that the order in which ranks end is known to the millisecond."""
        code = self.process.wait()
        self.ended = time.monotonic()
        self.code = code

    def kill(self) -> None:
        """Kills it with everything it has started (it leads a session of its own)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def describe(self) -> str:
        """How it ended, as one sentence: rank, process, host, code or signal."""
        assert self.code is not None
        who = f"rank {self.rank} (pid {self.process.pid} on {socket.gethostname()})"
        if self.code >= 0:
            return f"{who} exited with code {self.code}"
        number = -self.code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = " (when nobody sent it: the kernel, short of memory)" if number == signal.SIGKILL else ""
        return f"{who} was killed by {name}{hint}"


class WorkerAgent(SimpleElasticAgent):
    """Runs `command` once per local rank. `shown` ranks write to the terminal, the others to `log_folder`/rankN.log."""

    def __init__(
        self,
        spec: WorkerSpec,
        command: list[str],
        env: dict[str, str],
        shown: set[int],
        log_folder: Path,
        relay: SignalRelay,
    ) -> None:
        super().__init__(spec)
        self._command, self._env, self._shown, self._log_folder, self._relay = command, env, shown, log_folder, relay
        self._workers: list[LocalWorker] = []
        self._threads: list[threading.Thread] = []

    def exit_code(self) -> int:
        """The code of the whole run, and for a failure the line that names it; call after `run()`."""
        failed = [worker for worker in self._workers if worker.code not in (0, EXIT_STOPPED)]
        if not failed:
            return max(worker.code or 0 for worker in self._workers)
        if self._relay.killed:
            say(f"{self._relay.killed}: the workers were killed without saving")
            return 1
        first = _root_cause(failed)
        if first.log is not None and (end := _tail(first.log)):
            say(f"the end of {first.log}:\n{end}")
        say(first.describe())
        return 2 if first.code == 2 else 1

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for worker in worker_group.workers:
            rank, spec = worker.global_rank, worker_group.spec
            env = {
                **self._env,
                "RANK": str(rank),
                "LOCAL_RANK": str(worker.local_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                "GROUP_RANK": str(worker_group.group_rank),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
                "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
                LAUNCHER_PID: str(os.getpid()),
            }
            self._workers.append(self._start(rank, env))
        self._threads = [threading.Thread(target=worker.wait, daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()
        self._relay.attach([worker.process for worker in self._workers])
        return {
            worker.local_rank: local.process.pid
            for worker, local in zip(worker_group.workers, self._workers, strict=True)
        }

    def _start(self, rank: int, env: dict[str, str]) -> LocalWorker:
        # Called in the main thread, which lives as long as the launcher: the kernel binds a child to a parent's thread.
        # The signals that the relay waits for are blocked here, and in the worker until its StopFlag lets them in.
        path: Path | None = None
        output: AbstractContextManager[IO[bytes] | None] = contextlib.nullcontext()
        if rank not in self._shown:
            try:
                self._log_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"the log folder {self._log_folder} cannot be made: {error.strerror}"
                raise ConfigError.at("job.dump_folder", why) from None
            path = self._log_folder / f"rank{rank}.log"
            output = path.open("xb")
        with output as log:
            process = subprocess.Popen(
                self._command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on once
            )
        return LocalWorker(rank, process, path)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._relay.enforce_grace()
        failed = [worker for worker in self._workers if worker.code not in (None, 0, EXIT_STOPPED)]
        running = any(worker.code is None for worker in self._workers)
        if failed and (not running or time.monotonic() - min(worker.ended for worker in failed) > SETTLE_SECONDS):
            return RunResult(state=WorkerState.FAILED)
        if running:
            return RunResult(state=WorkerState.HEALTHY)
        return RunResult(
            state=WorkerState.SUCCEEDED, return_values={worker.rank: worker.code for worker in self._workers}
        )

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join(timeout)


def _root_cause(failed: list[LocalWorker]) -> LocalWorker:
    """The first to end, except that nobody exits with 2 because of somebody else.

    All ranks tell a bad config alike: one that the console shows has told it already.
    """
    return min(failed, key=lambda worker: (worker.code != 2, worker.code == 2 and worker.log is not None, worker.ended))


def _tail(path: Path) -> str:
    stream: IO[bytes]
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return stream.read().decode(errors="replace").rstrip()


def python_command(module: str, arguments: list[str]) -> list[str]:
    """This interpreter running `module`, unbuffered: what a killed worker has printed is in its log."""
    return [sys.executable, "-u", "-m", module, *arguments]
