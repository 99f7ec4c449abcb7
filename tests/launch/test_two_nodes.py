"""Training on two nodes of one rank each: two `titan_lite.launch` on this machine, of which one gets a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.launch.processes import ROOT, eventually

CONFIG = """
[model]
dim = 16
n_layers = 1
attention = { n_heads = 2 }
ffn = { hidden = 16 }
[data]
source = { type = "files", path = "TEXT" }
[training]
local_batch_size = 1
seq_len = 16
steps = 100000
mixed_precision_param = "float32"
[metrics]
log_freq = 1
compare_with_estimate = "never"
[checkpoint]
enable = true
interval = 100000
"""


def start(folder: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"NGPU": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "titan_lite.launch", str(folder / "config.toml"), *overrides]
    return [
        subprocess.Popen(command, env=env | {"NODE_RANK": str(node)}, text=True, stdout=-1, stderr=-2)
        for node in range(2)
    ]


def finish(nodes: list[subprocess.Popen[str]]) -> list[int]:
    for node in nodes:
        output, _ = node.communicate(timeout=150)
        print(output)
    return [node.returncode for node in nodes]


def steps(folder: Path) -> list[int]:
    file = folder / "out" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


def test_a_signal_to_one_node_saves_on_both_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 2000)
    (tmp_path / "config.toml").write_text(
        f'[job]\ndump_folder = "{tmp_path}/out"\n' + CONFIG.replace("TEXT", f"{tmp_path}/text.txt")
    )
    nodes = start(tmp_path)
    try:
        assert eventually(lambda: bool(steps(tmp_path)), 120.0)
        nodes[1].send_signal(signal.SIGTERM)
        assert finish(nodes) == [75, 75]
        done = steps(tmp_path)[-1]
        assert (tmp_path / "out" / "checkpoint" / f"step-{done}").is_dir()
        nodes = start(tmp_path, f"--training.steps={done + 2}")
        assert finish(nodes) == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert steps(tmp_path) == list(range(1, done + 3))
