"""What this machine has, as far as checking a config needs to know."""

from __future__ import annotations

import importlib.util

import torch


def has_cuda() -> bool:
    """Whether a run on this machine would use CUDA. Asks the driver without starting it: workers may yet be forked."""
    return torch.cuda.device_count() > 0


def is_installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of that name, such as wandb leaves behind, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
