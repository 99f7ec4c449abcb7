"""What the benchmarks share: medians with their spread, the machine in words, ATen op counts."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

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


class OpCounter(Protocol):
    """Counts calls of ATen ops by name between `start` and `stop`."""

    def start(self) -> None: ...
    def stop(self) -> Counter[str]: ...


class DispatchedOps(TorchDispatchMode):
    """Those that reach a kernel, under autograd; what runs inside a compiled graph would be run eagerly instead."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> Counter[str]:
        self.__exit__(None, None, None)
        return self._counts


class ProfiledOps:
    """Those that the profiler sees: composite ops and what they call alike, and what a compiled graph calls."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> Counter[str]:
        self._profile.stop()
        names = (event.name for event in self._profile.events())
        return Counter(name.replace("::", ".") for name in names if name.startswith("aten::"))


def difference(ours: Counter[str], theirs: Counter[str]) -> dict[str, int]:
    """Calls that `ours` makes more (negative: fewer) than `theirs`, where the numbers differ."""
    return {name: ours[name] - theirs[name] for name in sorted(ours | theirs) if ours[name] != theirs[name]}
