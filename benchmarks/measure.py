"""What the benchmarks share: medians with their spread, the machine in words, ATen op counts."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from titan_lite.run.device import device_name


def machine() -> str:
    """The machine and the load it is under."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    name = device_name(torch.device("cpu"))
    python = platform.python_version()
    return f"{os.cpu_count()} x {name}, load {load}, torch {torch.__version__}, Python {python}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (min .. max)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


class OpCounter:
    """Counts the calls of every ATen op, composite ones and those they call alike, between `start` and `stop`."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> Counter[str]:
        self._profile.stop()
        names = (event.name for event in self._profile.events())
        return Counter(name for name in names if name.startswith("aten::"))


def difference(ours: Counter[str], theirs: Counter[str]) -> dict[str, int]:
    """Calls that `ours` makes more (negative: fewer) than `theirs`, where the numbers differ."""
    return {name: ours[name] - theirs[name] for name in sorted(ours | theirs) if ours[name] != theirs[name]}
