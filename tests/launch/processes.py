"""What the launch tests know about processes, read from /proc without the launcher's help."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from titan_lite import agent
from titan_lite.launch import read_cluster, run_workers
from titan_lite.relay import SignalRelay

ROOT = Path(__file__).resolve().parents[2]
LISTEN = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


# Launchers are forked from one server that has imported torch already: each would otherwise pay two seconds for it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.launch.processes", "titan_lite.agent"])


@dataclass
class ToyLauncher:
    """A running launcher of toy workers."""

    process: ForkServerProcess
    error_file: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def send_signal(self, number: int) -> None:
        """Sends a signal to the launcher alone."""
        os.kill(self.pid, number)

    def finish(self, timeout: float = 30.0) -> tuple[int | None, str]:
        """Waits for its end: the exit code (None: it did not end in time) and what it wrote to stderr."""
        self.process.join(timeout)
        return self.process.exitcode, self.error_file.read_text()


@contextmanager
def toy_launcher(folder: Path, *arguments: str, **environment: str) -> Iterator[ToyLauncher]:
    """Starts a launcher whose workers run `toy_worker.py FOLDER ARGUMENTS`; killed at the end if it still runs."""
    cluster = {"NGPU": "2", **environment}
    error_file = folder / f"launcher{cluster.get('NODE_RANK', '')}.log"
    process = SERVER.Process(target=_launch, args=(folder, arguments, cluster, error_file))
    process.start()
    try:
        yield ToyLauncher(process, error_file)
    finally:
        process.kill()
        process.join()


def _launch(folder: Path, arguments: tuple[str, ...], cluster: dict[str, str], error_file: Path) -> None:
    os.dup2(os.open(error_file, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(cluster, PYTHONPATH=str(ROOT), TMPDIR=str(folder))  # what a killed launcher leaves goes there
    agent.SETTLE_SECONDS = 0.2
    relay = SignalRelay().listen()
    command = [sys.executable, "-u", str(Path(__file__).with_name("toy_worker.py")), str(folder), *arguments]
    sys.exit(run_workers(command, read_cluster(os.environ), folder, relay))


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` comes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def worker_pids(folder: Path, n: int, seconds: float = 60.0) -> list[int]:
    """The pids that `n` toy workers have left in `folder`, once all are there."""
    files = [folder / f"pid.{rank}" for rank in range(n)]
    assert eventually(lambda: all(file.exists() for file in files), seconds), "the workers did not start"
    return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie that nobody has reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def listening_addresses(pid: int) -> set[str]:
    """The local addresses (hexadecimal, as in /proc/net/tcp) on which the process listens."""
    links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in links:
                addresses.add(fields[1].partition(":")[0])
    return addresses
