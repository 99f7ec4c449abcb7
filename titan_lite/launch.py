"""Launches training on this node: checks the config, then runs one worker process per device.

    python -m titan_lite.launch CONFIG.toml [--section.key=value ...]

Environment variables describe the machines:
    NGPU         workers on this node (default: the CUDA devices, else 1)
    NNODES       nodes (default 1); each of them runs this command with its own
    NODE_RANK    from 0 to NNODES - 1, and with the address of node 0 in
    MASTER_ADDR  and
    MASTER_PORT  (default 29500)
    LOG_RANK     ranks shown on the console, comma-separated (default 0); the others write to <dump_folder>/logs/
torchrun's own names for them do as well, which clusters set: PET_NPROC_PER_NODE, PET_NNODES, PET_NODE_RANK,
PET_MASTER_ADDR, PET_MASTER_PORT, and PET_RDZV_ENDPOINT (address:port).

Exit codes: 0 done, 2 bad config or input, 75 stopped on a signal after saving (start it again to go on), 1 all else.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from titan_lite.config.errors import ConfigError, main_guard
from titan_lite.relay import SignalRelay, say
from titan_lite.run.environment import STORE

DEFAULT_PORT = 29500
_TORCHRUNS_NAMES = {
    "PET_NPROC_PER_NODE": "NGPU",
    "PET_NNODES": "NNODES",
    "PET_NODE_RANK": "NODE_RANK",
    "PET_MASTER_ADDR": "MASTER_ADDR",
    "PET_MASTER_PORT": "MASTER_PORT",
}
RENDEZVOUS_SECONDS = 900
"""How long a node waits for the others."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run as this node sees them. `workers` is per node, `shown` holds global ranks."""

    workers: int
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "localhost"
    master_port: int = DEFAULT_PORT
    shown: frozenset[int] = frozenset({0})

    @property
    def world_size(self) -> int:
        """Workers on all nodes."""
        return self.workers * self.nodes


def read_cluster(environment: Mapping[str, str]) -> Cluster:
    """The cluster that NGPU, NNODES, ... describe. Raises ConfigError naming the variable."""
    environment = _with_torchruns_names(environment)
    workers = _whole_number(environment, "NGPU", None, 1, 4096)
    if workers is None:
        import torch

        workers = max(1, torch.cuda.device_count())
    nodes = _whole_number(environment, "NNODES", 1, 1, 1 << 20) or 1
    node_rank = _whole_number(environment, "NODE_RANK", 0 if nodes == 1 else None, 0, nodes - 1)
    port = _whole_number(environment, "MASTER_PORT", DEFAULT_PORT, 1, 65535) or DEFAULT_PORT
    if node_rank is None:
        raise ConfigError.at("NODE_RANK", "is needed with NNODES > 1", allowed=f"0 to {nodes - 1}, one per node")
    if nodes > 1 and not environment.get("MASTER_ADDR"):
        raise ConfigError.at("MASTER_ADDR", "is needed with NNODES > 1", allowed="the host name or address of node 0")
    shown = _ranks(environment.get("LOG_RANK", "0"), workers * nodes)
    return Cluster(workers, nodes, node_rank, environment.get("MASTER_ADDR", "localhost"), port, shown)


def _with_torchruns_names(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with torchrun's names for its options read as ours. Two names may not say two things."""
    found = dict(environment)
    given = {ours: environment.get(theirs, "") for theirs, ours in _TORCHRUNS_NAMES.items()}
    if given["NGPU"] in ("auto", "gpu"):
        given["NGPU"] = ""  # the devices there are, as without it
    elif given["NGPU"] == "cpu":
        given["NGPU"] = str(os.cpu_count() or 1)
    sources = {ours: theirs for theirs, ours in _TORCHRUNS_NAMES.items()}
    if endpoint := environment.get("PET_RDZV_ENDPOINT", ""):
        address, _, port = endpoint.rpartition(":")
        if not address or not port.isdecimal():
            why = "is not the address of node 0 with a port"
            raise ConfigError.at("PET_RDZV_ENDPOINT", why, value=endpoint, allowed="address:port")
        for ours, value in (("MASTER_ADDR", address.strip("[]")), ("MASTER_PORT", port)):
            if not given[ours]:
                given[ours], sources[ours] = value, "PET_RDZV_ENDPOINT"
    for ours, value in given.items():
        if value and found.setdefault(ours, value) != value:
            why = f"says something else than {ours} = {found[ours]}"
            raise ConfigError.at(sources[ours], why, value=value, allowed=f"one of the two, or the same in {ours}")
    return found


def _whole_number(environment: Mapping[str, str], name: str, default: int | None, low: int, high: int) -> int | None:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ConfigError.at(name, "is not a number this variable can have", value=text, allowed=f"{low} to {high}")
    return int(text)


def _ranks(text: str, world_size: int) -> frozenset[int]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if any(not name.isdecimal() or int(name) >= world_size for name in names):
        allowed = f"ranks from 0 to {world_size - 1}, comma-separated"
        raise ConfigError.at("LOG_RANK", "names a rank that does not exist", value=text, allowed=allowed)
    return frozenset(int(name) for name in names)


def worker_environment(environment: Mapping[str, str], cluster: Cluster) -> dict[str, str]:
    """The launcher's environment plus defaults for what the user has not set."""
    from titan_lite.config.machine import has_cuda  # slow: torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // cluster.workers)), "TOKENIZERS_PARALLELISM": "false"}
    if not has_cuda():
        # Without CUDA the run measures a step with torch's profiler, which tells of itself on standard error.
        defaults |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
    if cluster.nodes == 1:
        loopback = "lo" if sys.platform == "linux" else "lo0"
        defaults |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return {**defaults, **environment}


def run_workers(command: list[str], cluster: Cluster, dump_folder: Path, relay: SignalRelay) -> int:
    """Runs `command` as every local rank and returns the exit code of the run."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous.api import RendezvousHandler
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from titan_lite.agent import FileRendezvous, WorkerAgent

    env = worker_environment(os.environ, cluster)
    log_folder = dump_folder / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="titan_lite-", ignore_cleanup_errors=True) as folder:
        rendezvous: RendezvousHandler
        if cluster.nodes == 1:
            rendezvous = FileRendezvous(Path(folder))
            env[STORE] = str(Path(folder) / "workers")
        else:
            env.pop(STORE, None)
            address = cluster.master_addr, cluster.master_port, cluster.node_rank, cluster.nodes
            rendezvous = StaticTCPRendezvous(*address, run_id="titan_lite", timeout=RENDEZVOUS_SECONDS)
        spec = WorkerSpec(
            role="worker",
            local_world_size=cluster.workers,
            rdzv_handler=rendezvous,
            entrypoint=command[0],
            max_restarts=0,
        )
        agent = WorkerAgent(spec, command, env, set(cluster.shown), log_folder, relay)
        agent.run()
        return agent.exit_code()


def main(arguments: list[str]) -> int:
    """Checks the config, then launches; returns the exit code."""
    relay = SignalRelay().listen()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments else 2
    from titan_lite.config.load import load_job

    with main_guard():
        cluster = read_cluster(os.environ)
        job = load_job(arguments[0], arguments[1:], world_size=cluster.world_size)
    from torch.distributed import DistError

    from titan_lite.agent import python_command

    command = python_command("titan_lite.train", arguments)
    try:
        return run_workers(command, cluster, Path(job.job.dump_folder), relay)
    except DistError as error:
        where = f"{cluster.master_addr}:{cluster.master_port}"
        say(f"node {cluster.node_rank} ({socket.gethostname()}) did not meet the other nodes at {where}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
