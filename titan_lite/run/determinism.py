"""Seeds and deterministic kernels."""

from __future__ import annotations

import os
import random

import numpy
import torch


def set_deterministic(warn_only: bool = False) -> None:
    """Makes torch choose deterministic kernels and fail (or, with `warn_only`, warn) where an operation has none.

    Call before the first CUDA operation: cuBLAS reads its workspace setting when its handle is made.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's own generators (all devices).

    The run's own draws are derived from (seed, step, name); this is for what libraries draw behind its back.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
