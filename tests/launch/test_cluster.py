"""The environment variables that describe the machines, and the defaults that workers get."""

from __future__ import annotations

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.launch import Cluster, read_cluster, worker_environment


def test_one_worker_is_the_default_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert read_cluster({}) == Cluster(1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert read_cluster({"LOG_RANK": "0,7"}) == Cluster(8, shown=frozenset({0, 7}))


def test_several_nodes_are_read_from_torchruns_variables() -> None:
    variables = {
        "NGPU": "8",
        "NNODES": "4",
        "NODE_RANK": "3",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "1234",
        "LOG_RANK": "31",
    }
    cluster = read_cluster(variables)
    assert cluster == Cluster(8, 4, 3, "head", 1234, frozenset({31}))
    assert cluster.world_size == 32


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"NGPU": "0"}, "NGPU"),
        ({"NGPU": "two"}, "NGPU"),
        ({"NGPU": "-1"}, "NGPU"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK"),
        ({"NODE_RANK": "1"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"LOG_RANK": "2"}, "LOG_RANK"),
        ({"LOG_RANK": "all"}, "LOG_RANK"),
    ],
)
def test_a_bad_variable_is_named(variables: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_cluster({"NGPU": "2", **variables})
    (problem,) = caught.value.problems
    assert problem.key == named
    assert problem.allowed


TORCHRUN = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "head", "PET_MASTER_PORT": "1234"}


def test_torchruns_own_names_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubeflow Trainer sets them."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    for workers in ({}, {"PET_NPROC_PER_NODE": "auto"}, {"PET_NPROC_PER_NODE": "gpu"}, {"PET_NPROC_PER_NODE": "8"}):
        assert read_cluster(TORCHRUN | workers) == Cluster(8, 4, 3, "head", 1234)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert read_cluster(TORCHRUN | {"PET_NPROC_PER_NODE": "cpu", "NNODES": "4"}) == Cluster(2, 4, 3, "head", 1234)
    endpoint = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_RDZV_ENDPOINT": "[fe80::1]:1234"}
    assert read_cluster(endpoint) == Cluster(8, 4, 3, "fe80::1", 1234)
    assert read_cluster({"NODE_RANK": "0", "PET_NNODES": "1"}) == Cluster(8)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"NNODES": "2"}, "PET_NNODES"),
        ({"MASTER_PORT": "1235"}, "PET_MASTER_PORT"),
        ({"PET_MASTER_PORT": "", "MASTER_PORT": "1", "PET_RDZV_ENDPOINT": "head:1234"}, "PET_RDZV_ENDPOINT"),
        ({"PET_RDZV_ENDPOINT": "head"}, "PET_RDZV_ENDPOINT"),
        ({"PET_NPROC_PER_NODE": "many"}, "NGPU"),
        ({"PET_NODE_RANK": "4"}, "NODE_RANK"),
    ],
)
def test_a_bad_variable_of_torchrun_is_named(variables: dict[str, str], named: str) -> None:
    workers = {} if "PET_NPROC_PER_NODE" in variables else {"NGPU": "1"}
    with pytest.raises(ConfigError) as caught:
        read_cluster(TORCHRUN | workers | variables)
    (problem,) = caught.value.problems
    assert problem.key == named
    assert problem.allowed


def test_workers_share_the_cores_and_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("titan_lite.config.machine.has_cuda", lambda: False)
    env = worker_environment({"PATH": "/bin"}, Cluster(3))
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
    assert env["KINETO_LOG_LEVEL"] == "99"  # the profiler of one step says nothing; there is no CUDA here
    assert worker_environment({}, Cluster(9))["OMP_NUM_THREADS"] == "1"
    assert "GLOO_SOCKET_IFNAME" not in worker_environment({}, Cluster(1, nodes=2))


def test_the_users_own_settings_win() -> None:
    env = worker_environment({"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth0"}, Cluster(2))
    assert (env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"]) == ("7", "eth0")
