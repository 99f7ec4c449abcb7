"""Worker processes joined in one gloo process group, started once and reused by many tests.

    def norm(values):                      # module-level; every rank runs it, dist.get_rank() tells them apart
        ...
        return total

    def test_norm(pool2):
        assert pool2.run(norm, [1.0, 2.0]) == [3.0, 3.0]          # one result per rank

Importing torch costs two seconds a process: paid once per pool and session, not once per test. A function that
raises or hangs fails its own test only: the pool is then killed and the next `run` starts a fresh one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 120.0
SETTLE_SECONDS = 5.0
"""How long the other ranks may go on once one has raised: they usually wait for it in a collective."""


class WorkerPool:
    """`n` processes, each a rank of one gloo group. Not thread-safe; `close()` when done."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._folder: Path | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []

    def run(self, fn: Callable[..., Any] | str, *args: Any, timeout: float = 60.0) -> list[Any]:
        """Runs `fn(*args)` on every rank and returns the results by rank.

        `fn` is a module-level function or "module:function". Arguments and results travel pickled, tensors by value.
        Raises AssertionError with the first rank's traceback and log when a rank raises, dies, or takes longer than
        `timeout` seconds.
        """
        request = pickle.dumps((_name(fn), args))
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(request)
        return self._collect(timeout, _name(fn))

    def close(self) -> None:
        """Kills the workers and removes their folder."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="titan_lite-pool-"))
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
            "TITAN_LITE_LAUNCHER_PID": str(os.getpid()),
        }
        for rank in range(self.n):
            ours, theirs = Pipe()
            command = [sys.executable, "-m", "tests.distributed.pool", str(theirs.fileno()), str(rank), str(self.n)]
            with (self._folder / f"rank{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, str(self._folder)],
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                )
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(START_TIMEOUT, "start")

    def _collect(self, timeout: float, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.n:
            waiting = {
                pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results and rank not in failures
            }
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    ok, value = False, f"died with exit code {self._processes[rank].wait()}"
                if ok:
                    results[rank] = value
                else:
                    failures.setdefault(rank, value)
                    deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        if len(results) == self.n:
            return [results[rank] for rank in range(self.n)]
        self._fail(what, failures, results, timeout)
        raise AssertionError("unreachable")

    def _fail(self, what: str, failures: dict[int, str], results: dict[int, Any], timeout: float) -> None:
        if failures:
            rank, why = next(iter(failures.items()))
        else:
            rank = min(set(range(self.n)) - set(results))
            why = f"no result within {timeout:g} s"
        assert self._folder is not None
        log = (self._folder / f"rank{rank}.log").read_text(errors="replace")[-4000:]
        self.close()
        raise AssertionError(f"{what} on rank {rank} of {self.n}: {why}\n--- log of rank {rank} ---\n{log}")


def _name(fn: Callable[..., Any] | str) -> str:
    if isinstance(fn, str):
        return fn
    assert "." not in fn.__qualname__, f"{fn.__qualname__} is not a module-level function"
    return f"{fn.__module__}:{fn.__qualname__}"


def _answer(request: bytes) -> bytes:
    try:
        name, args = pickle.loads(request)
        module, _, function = name.partition(":")
        return pickle.dumps((True, getattr(importlib.import_module(module), function)(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _serve(fd: int, rank: int, world_size: int, folder: Path) -> None:
    """A worker's life: join the group, then answer requests until the pipe closes."""
    from titan_lite.run.signals import die_with_parent

    die_with_parent()
    pipe = Connection(fd)
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    begin = _reuse_groups()
    pipe.send_bytes(pickle.dumps((True, None)))
    with contextlib.suppress(EOFError):
        while True:
            begin()
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _reuse_groups() -> Callable[[], None]:
    """Groups and meshes that were made once are given out again, to the functions after the one that made them: each
    gloo group has threads that live as long as it. To be called before each function: what comes back.

    Leaving the groups behind a function is no way: torch caches what it finds out about tensors by mesh, and equal
    meshes of later functions would be given the groups of those that are gone.
    """
    import torch.distributed as dist

    from titan_lite.parallel import mesh

    made: dict[str, list[Any]] = {}
    given: Counter[str] = Counter()

    def reusing(make: Callable[..., Any]) -> Callable[..., Any]:
        def give(*args: Any, **options: Any) -> Any:
            key = repr((make.__name__, args, sorted(options.items())))
            there = made.setdefault(key, [])
            if given[key] == len(there):
                there.append(make(*args, **options))
            given[key] += 1
            return there[given[key] - 1]

        return give

    mesh.init_device_mesh = reusing(mesh.init_device_mesh)
    dist.new_group = reusing(dist.new_group)
    return given.clear


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
