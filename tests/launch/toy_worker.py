"""A worker doing what the test asks: `toy_worker.py FOLDER BEHAVIOUR [ARGUMENTS]`; its pid is in FOLDER/pid.RANK."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from titan_lite.run.signals import EXIT_STOPPED, StopFlag, die_with_parent

RANK = int(os.environ["RANK"])


def ready(folder: Path) -> None:
    """Tells the test that this rank is up: a file appears with its content complete."""
    (folder / f"tmp.{RANK}").write_text(str(os.getpid()))
    (folder / f"tmp.{RANK}").rename(folder / f"pid.{RANK}")


def exit_with(codes: str) -> int:
    """The code at this rank's place in "a,b,..."; "-9" dies of that signal, "raise" raises."""
    code = codes.split(",")[RANK]
    if code == "raise":
        raise RuntimeError(f"rank {RANK} broke")
    if code.startswith("-"):
        os.kill(os.getpid(), -int(code))
    if code == "wait":
        time.sleep(1000)
    return int(code)


def train(folder: Path, stop: StopFlag, save_seconds: str = "0") -> int:
    """Steps until asked to stop, then saves: later ranks take longer."""
    ready(folder)
    while not stop:
        time.sleep(0.01)
    time.sleep(float(save_seconds) * (1 + RANK))
    (folder / f"saved.{RANK}").write_text(str(stop.signal_name))
    return EXIT_STOPPED


def process_group(folder: Path) -> None:
    """Joins the group the way titan_lite's workers do, sums the ranks, and stays until told to go."""
    import torch
    import torch.distributed as dist

    store = os.environ.get("TITAN_LITE_STORE")
    world_size = int(os.environ["WORLD_SIZE"])
    if store is None:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=RANK, world_size=world_size)
    total = torch.tensor([RANK + 1])
    dist.all_reduce(total)
    (folder / f"sum.{RANK}").write_text(str(total.item()))
    ready(folder)
    while not (folder / "go").exists():
        time.sleep(0.01)
    dist.destroy_process_group()


def reduce(folder: Path) -> None:
    """Joins the group and sums with the others, step after step, as long as all of them are there."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    ready(folder)
    while True:
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)


def environment(folder: Path) -> None:
    """Shows on stdout what the launcher has set."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "OMP_NUM_THREADS",
        "GLOO_SOCKET_IFNAME",
    ):
        print(f"{name}={os.environ.get(name)}")


def main(folder: Path, behaviour: str, *arguments: str) -> int | None:
    die_with_parent()
    stop = StopFlag().install()
    if behaviour == "train":
        return train(folder, stop, *arguments)
    if behaviour == "deaf":
        ready(folder)
        time.sleep(1000)
    if behaviour == "exit":
        return exit_with(*arguments)
    return {"process_group": process_group, "reduce": reduce, "environment": environment}[behaviour](folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
