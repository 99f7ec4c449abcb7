"""What this machine has, as far as checking a config needs to know."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from functools import cache

import torch


def has_cuda() -> bool:
    """Whether a run on this machine would use CUDA. Asks the driver without starting it: workers may yet be forked."""
    return torch.cuda.device_count() > 0


@cache
def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of this machine's least capable NVIDIA GPU, None where there is none or it is unknown."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = [(int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d+)", answer)]
    return min(found, default=None)


def is_installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of that name, such as wandb leaves behind, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
