"""One run at a time in a dump folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.run.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from titan_lite.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_kill(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError) as error:
            RunLock(tmp_path)
        assert f"pid {holder.pid} on {os.uname().nodename}" in str(error.value)
        assert str(tmp_path) in str(error.value)
        with pytest.raises(ConfigError):  # asking has not released it
            RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
    RunLock(tmp_path).release()


def test_the_process_itself_is_refused_a_second_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new"), pytest.raises(ConfigError, match="this very process"):
        RunLock(tmp_path / "new" / "..." / ".." / ".." / "new")
    with RunLock(tmp_path / "new"):
        pass


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)  # lives until the parent is done
        os._exit(0)
    lock.release()
    code = "import sys; from pathlib import Path; from titan_lite.run.lock import RunLock; RunLock(Path(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    os.close(write)
    os.close(read)
    os.waitpid(pid, 0)
