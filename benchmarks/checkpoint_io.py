"""Seconds to save and load 100 M parameters with their Adam state (1.2 GB): ours, stock DCP, torch.save + fsync.

    python benchmarks/checkpoint_io.py [--parameters 100_000_000] [--rounds 5] [--folder DIR]

The ways alternate within a round, and each way's files are removed and synced before the next begins, so that drift of
the disk hits all alike. A save counts until its bytes are durable (stock DCP syncs its files too). Ours hashes on save
and verifies on load; the others do neither. Loads read what was just written, from the page cache: they compare work
per byte, not disks.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from titan_lite.checkpoint.config import Checkpoint
from titan_lite.checkpoint.facts import RunFacts
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.manifest import read_manifest, verify
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.world import Alone

Tensors = dict[str, Tensor]


def make_tensors(parameters: int) -> Tensors:
    """Sixty equal weights, with exp_avg, exp_avg_sq and step each."""
    rows = max(1, parameters // (60 * 1024))
    tensors = {}
    for i in range(60):
        for name in (f"model.layers.{i}", f"optim.layers.{i}.exp_avg", f"optim.layers.{i}.exp_avg_sq"):
            tensors[name] = torch.randn(rows, 1024)
        tensors[f"optim.layers.{i}.step"] = torch.tensor(1.0)
    return tensors


def ours_save(folder: Path, tensors: Tensors) -> None:
    manager = CheckpointManager(Checkpoint(enable=True), folder, Alone(), RunFacts(""))
    manager.save(1, tensors, {"step": 1}, last=True)


def ours_load(folder: Path, tensors: Tensors) -> None:
    restore(folder / "checkpoint" / "step-1", tensors)


def dcp_save(folder: Path, tensors: Tensors) -> None:
    dcp.save(dict(tensors), checkpoint_id=folder)


def dcp_load(folder: Path, tensors: Tensors) -> None:
    dcp.load(dict(tensors), checkpoint_id=folder)


def torch_save(folder: Path, tensors: Tensors) -> None:
    folder.mkdir()
    with (folder / "model.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(folder: Path, tensors: Tensors) -> None:
    loaded = torch.load(folder / "model.pt", weights_only=True)
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])


WAYS: dict[str, tuple[Callable[[Path, Tensors], None], Callable[[Path, Tensors], None]]] = {
    "titan_lite": (ours_save, ours_load),
    "stock DCP": (dcp_save, dcp_load),
    "torch.save": (torch_save, torch_load),
}


def seconds(work: Callable[..., object], *args: object) -> float:
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def async_blocking(folder: Path, tensors: Tensors, mode: str) -> list[float]:
    """Seconds that `save` blocks in the background mode `mode`, for two saves in a row."""
    manager = CheckpointManager(Checkpoint(enable=True, async_mode=mode), folder, Alone(), RunFacts(""))  # type: ignore[arg-type]
    blocked = []
    for step in (1, 2):
        blocked.append(seconds(manager.save, step, tensors, {"step": step}))
        manager.wait(raises=True)
    shutil.rmtree(folder)
    return blocked


def measure(
    base: Path, tensors: Tensors, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    saves: dict[str, list[float]] = {way: [] for way in WAYS}
    loads: dict[str, list[float]] = {way: [] for way in WAYS}
    verifying = []
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for number in range(rounds):
        order = list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]
        for way in order:
            save, load = WAYS[way]
            folder = base / "run"
            os.sync()
            saves[way].append(seconds(save, folder, tensors))
            loads[way].append(seconds(load, folder, target))
            if way == "titan_lite":
                step = folder / "checkpoint" / "step-1"
                verifying.append(seconds(verify, step, read_manifest(step)))
            assert all(torch.equal(target[name], tensor) for name, tensor in tensors.items()), way
            for tensor in target.values():
                tensor.zero_()
            shutil.rmtree(folder)
    return saves, loads, verifying


def report(what: str, times: dict[str, list[float]]) -> None:
    ours = statistics.median(times["titan_lite"])
    for way, values in times.items():
        middle = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(times["titan_lite"], values, strict=True))
        print(
            f"{what}  {way:<11} median {middle:6.2f} s  (min {min(values):.2f}, max {max(values):.2f})"
            + ("" if way == "titan_lite" else f"  titan_lite / {way}: {ratio:.2f} (of medians {ours / middle:.2f})")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tensors = make_tensors(arguments.parameters)
    total = sum(tensor.nbytes for tensor in tensors.values())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    print(f"{total / 1e9:.2f} GB, {machine}, {arguments.folder}")
    base = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        saves, loads, verifying = measure(base, tensors, arguments.rounds)
        report("save", saves)
        report("load", loads)
        print(f"      of the load, reading and hashing every file: {statistics.median(verifying):.2f} s")
        for mode in ("async", "async_with_pinned_mem"):
            first, second = async_blocking(base / mode, tensors, mode)
            print(f"save  {mode}: blocks the caller {first:.2f} s the first time, {second:.2f} s the second")
        copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        for _ in range(2):
            plain = seconds(lambda: [copies[name].copy_(tensor) for name, tensor in tensors.items()])
        print(f"      (a plain copy of all tensors in memory: {plain:.2f} s)")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
