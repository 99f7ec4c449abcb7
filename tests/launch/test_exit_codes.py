"""One exit code for many workers: the table of design.md section 6, and the line that names the first failure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from titan_lite.launch import Cluster, run_workers
from titan_lite.relay import SignalRelay

TOY_WORKER = str(Path(__file__).with_name("toy_worker.py"))


def launch(folder: Path, *arguments: str, workers: int = 2, shown: frozenset[int] = frozenset({0})) -> int:
    command = [sys.executable, "-u", TOY_WORKER, str(folder), *arguments]
    return run_workers(command, Cluster(workers, shown=shown), folder, SignalRelay())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setattr("titan_lite.agent.SETTLE_SECONDS", 0.3)


@pytest.mark.parametrize(
    ("codes", "expected", "named"),
    [
        ("0,0", 0, ""),
        ("75,75", 75, ""),
        ("0,75", 75, ""),
        ("2,wait", 2, "rank 0 (pid {pid} on {host}) exited with code 2"),
        ("1,2", 2, "rank 1 (pid {pid} on {host}) exited with code 2"),
        ("3,0", 1, "rank 0 (pid {pid} on {host}) exited with code 3"),
        ("wait,-9", 1, "rank 1 (pid {pid} on {host}) was killed by SIGKILL"),
        ("-11,wait", 1, "rank 0 (pid {pid} on {host}) was killed by SIGSEGV"),
        ("75,1", 1, "rank 1 (pid {pid} on {host}) exited with code 1"),
    ],
)
def test_worker_codes_become_one_code(
    codes: str, expected: int, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "exit", codes) == expected
    error = capfd.readouterr().err
    assert "Traceback" not in error
    if not named:
        assert error == ""
        return
    lines = error.splitlines()
    assert len(lines) == 1
    before, _, after = named.partition("(pid {pid} on {host})")
    assert lines[0].startswith(f"titan_lite: {before}(pid ")
    assert after in lines[0]


def test_the_end_of_a_hidden_ranks_log_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, "exit", "wait,raise") == 1
    error = capfd.readouterr().err
    log = next((tmp_path / "logs").glob("*/rank1.log"))
    assert str(log) in error
    assert error.count("RuntimeError: rank 1 broke") == 1
    assert "RuntimeError: rank 1 broke" in log.read_text()


def test_a_shown_ranks_traceback_is_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, "exit", "raise,wait") == 1
    assert capfd.readouterr().err.count("RuntimeError: rank 0 broke") == 1


def test_shown_ranks_write_to_the_terminal_and_the_others_to_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(9)))
    assert launch(tmp_path, "environment", workers=3, shown=frozenset({1})) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown == [
        "RANK=1",
        "LOCAL_RANK=1",
        "WORLD_SIZE=3",
        "LOCAL_WORLD_SIZE=3",
        "GROUP_RANK=0",
        "OMP_NUM_THREADS=3",
        "GLOO_SOCKET_IFNAME=lo",
    ]
    logs = {log.name: log.read_text().splitlines()[0] for log in (tmp_path / "logs").glob("*/*")}
    assert logs == {"rank0.log": "RANK=0", "rank2.log": "RANK=2"}
