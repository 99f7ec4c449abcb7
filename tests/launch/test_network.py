"""What a run opens to the network: nothing beyond loopback on one node; torchrun's variables on several."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.launch.processes import LOOPBACK, alive, eventually, listening_addresses, toy_launcher, worker_pids


def test_listening_sockets_are_found() -> None:
    with socket.socket() as open_to_all:
        open_to_all.bind(("", 0))
        open_to_all.listen()
        assert not listening_addresses(os.getpid()) <= LOOPBACK


def test_one_node_listens_on_loopback_only(tmp_path: Path) -> None:
    with toy_launcher(tmp_path, "process_group") as launcher:
        pids = worker_pids(tmp_path, 2)
        assert listening_addresses(launcher.pid) == set()
        for pid in pids:
            assert listening_addresses(pid) <= LOOPBACK
        (tmp_path / "go").touch()
        assert launcher.finish() == (0, "")
    assert [(tmp_path / f"sum.{rank}").read_text() for rank in range(2)] == ["3", "3"]


@pytest.fixture
def cluster() -> dict[str, str]:
    """Two nodes of one worker each, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"NGPU": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}


def test_two_nodes_meet_through_torchruns_variables(cluster: dict[str, str], tmp_path: Path) -> None:
    with (
        toy_launcher(tmp_path, "process_group", **cluster, NODE_RANK="0") as first,
        toy_launcher(tmp_path, "process_group", **cluster, NODE_RANK="1") as second,
    ):
        worker_pids(tmp_path, 2)
        (tmp_path / "go").touch()
        assert [launcher.finish() for launcher in (first, second)] == [(0, ""), (0, "")]
    assert [(tmp_path / f"sum.{rank}").read_text() for rank in range(2)] == ["3", "3"]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_ends_when_another_ones_launcher_is_killed(killed: int, cluster: dict[str, str], tmp_path: Path) -> None:
    with (
        toy_launcher(tmp_path, "reduce", **cluster, NODE_RANK="0") as first,
        toy_launcher(tmp_path, "reduce", **cluster, NODE_RANK="1") as second,
    ):
        pids = worker_pids(tmp_path, 2)
        launchers = [first, second]
        launchers[killed].send_signal(signal.SIGKILL)
        code, error = launchers[1 - killed].finish()
        assert code == 1
        assert f"rank {1 - killed} (pid {pids[1 - killed]} on " in error
        assert eventually(lambda: not any(alive(pid) for pid in pids), 5.0)
