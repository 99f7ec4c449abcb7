"""Signals through the launcher to its workers, and workers that do not outlive it. Real processes throughout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.processes import ROOT, alive, eventually, toy_launcher, worker_pids
from titan_lite.run.signals import STOP_SIGNALS

SAVE_SECONDS = "0.3"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_rank_saves_and_the_launcher_exits_75(number: signal.Signals, tmp_path: Path) -> None:
    with toy_launcher(tmp_path, "train", SAVE_SECONDS) as launcher:
        worker_pids(tmp_path, 2)
        launcher.send_signal(number)
        launcher.send_signal(number)  # a scheduler's duplicate is not a second request
        code, error = launcher.finish()
    assert code == 75
    assert [(tmp_path / f"saved.{rank}").read_text() for rank in range(2)] == [number.name, number.name]
    assert error.count(number.name) == 1
    assert "Traceback" not in error


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with toy_launcher(tmp_path, "train", "60") as launcher:
        pids = worker_pids(tmp_path, 2)
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        launcher.send_signal(signal.SIGUSR1)  # another kind is no hurry
        time.sleep(0.9)
        assert all(alive(pid) for pid in pids)
        launcher.send_signal(signal.SIGTERM)
        code, error = launcher.finish()
    assert code == 1
    assert "second SIGTERM" in error
    assert not any(alive(pid) for pid in pids)
    assert not list(tmp_path.glob("saved.*"))


def test_a_signal_before_any_worker_runs_stops_the_launcher(tmp_path: Path) -> None:
    code = "from titan_lite.relay import SignalRelay; SignalRelay().listen(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(10) == 75


def test_kill_9_of_the_launcher_leaves_no_worker(tmp_path: Path) -> None:
    with toy_launcher(tmp_path, "deaf") as launcher:
        pids = worker_pids(tmp_path, 2)
        launcher.send_signal(signal.SIGKILL)
        assert eventually(lambda: not any(alive(pid) for pid in pids), 5.0)


def test_kill_9_of_a_worker_is_named_and_ends_the_others(tmp_path: Path) -> None:
    with toy_launcher(tmp_path, "deaf") as launcher:
        pids = worker_pids(tmp_path, 2)
        os.kill(pids[1], signal.SIGKILL)
        code, error = launcher.finish()
    assert code == 1
    assert f"rank 1 (pid {pids[1]} on " in error
    assert "SIGKILL" in error
    assert "Traceback" not in error
    assert not alive(pids[0])


def test_a_worker_whose_launcher_is_already_gone_does_not_start() -> None:
    code = "from titan_lite.run.signals import die_with_parent; die_with_parent(); print('started')"
    env = {**os.environ, "TITAN_LITE_LAUNCHER_PID": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_forked_child_ends_on_sigterm_and_ignores_the_rest(tmp_path: Path) -> None:
    code = """
import os, signal, time
from titan_lite.run.signals import StopFlag
stop = StopFlag().install()
child = os.fork()
if child == 0:
    while True:
        time.sleep(0.01)
time.sleep(0.2)
os.kill(child, signal.SIGUSR1)
time.sleep(0.2)
assert os.waitpid(child, os.WNOHANG) == (0, 0)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
assert not stop
os.kill(os.getpid(), signal.SIGUSR2)
assert stop and stop.signal_name == "SIGUSR2"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)


def test_signals_need_no_torch() -> None:
    code = "import sys; import titan_lite.run.signals; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
