"""The dtypes of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from titan_lite.run.device import native_bf16

if TYPE_CHECKING:
    from titan_lite.run.config import Training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Where each dtype is used."""

    master: torch.dtype
    """Parameters and optimizer state at rest."""
    param: torch.dtype
    """Gathered parameters and activations."""
    reduce: torch.dtype
    """Gradients while they are summed over ranks."""

    @classmethod
    def of(cls, training: Training, device: torch.device) -> Precision:
        """What `[training]` asks for on `device`; `auto` is bfloat16 only where the device multiplies it natively."""
        master = DTYPES[training.dtype]
        choice = training.mixed_precision_param
        if master is torch.bfloat16 or choice == "bfloat16":
            param = torch.bfloat16
        elif choice == "auto":
            param = torch.bfloat16 if native_bf16(device) else torch.float32
        else:
            param = torch.float32
        return cls(master, param, DTYPES[training.mixed_precision_reduce])

    @property
    def mixed(self) -> bool:
        """Whether parameters are cast on their way into the forward, which FSDP does."""
        return self.param is not self.master
