"""The dtypes of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from titan_lite.models.spec import Role, Spec
from titan_lite.run.device import native_bf16

if TYPE_CHECKING:
    from titan_lite.job import Job

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
    by_role: Mapping[Role, torch.dtype]
    """In place of `master`, for the parameters of some roles."""

    @classmethod
    def of(cls, job: Job, device: torch.device) -> Precision:
        """What the job asks for on `device`; `auto` is bfloat16 only where the device multiplies it natively."""
        training = job.training
        master = DTYPES[training.dtype]
        choice = training.mixed_precision_param
        if master is torch.bfloat16 or choice == "bfloat16":
            param = torch.bfloat16
        elif choice == "auto":
            param = torch.bfloat16 if native_bf16(device) else torch.float32
        else:
            param = torch.float32
        by_role = {role: DTYPES[name] for role, name in job.model.param_dtype.by_role().items()}
        return cls(master, param, DTYPES[training.mixed_precision_reduce], by_role)

    @property
    def masters(self) -> list[torch.dtype]:
        """The dtypes of parameters at rest, `master` first."""
        return list(dict.fromkeys((self.master, *self.by_role.values())))

    @property
    def mixed(self) -> bool:
        """Whether parameters are cast on their way into the forward, which FSDP does."""
        return self.masters != [self.param]

    def store(self, model: nn.Module, specs: Mapping[str, Spec]) -> None:
        """Gives each parameter of a model on the meta device the dtype in which it rests."""
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self.by_role.get(specs[name].role, self.master))
