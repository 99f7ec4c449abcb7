"""What of a model and its optimizer goes into a checkpoint: tensors by name, the same names for every layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from titan_lite.models.memory import LaneMemory
from titan_lite.models.spec import named_state


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer as `model.<name>`, tied ones once."""
    return {f"model.{name}": tensor.detach() for name, tensor in named_state(model)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every state tensor as `optim.<parameter name>.<slot>`; see `materialize_optimizer_state`."""
    return {
        f"optim.{name}.{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()  # a frozen one has none
    }


def memory_tensors(memory: LaneMemory, state: Mapping[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """What lanes remember as `memory.<name>`: this rank's rows, as part of the global batch's, in the order of ranks.

    `mesh` has all ranks, whose data-parallel groups hold equally many rows; None = there is one rank.
    """
    if mesh is None:
        return {f"memory.{name}": tensor for name, tensor in state.items()}
    axes = mesh.mesh_dim_names or ()

    def placed(name: str, tensor: Tensor) -> Tensor:
        dim = memory.split_dim(name)
        in_group = Replicate() if dim is None else Shard(dim)
        places = [in_group if axis == "tp" else Shard(0) for axis in axes]
        return DTensor.from_local(tensor, mesh, places, run_check=False)

    return {f"memory.{name}": placed(name, tensor) for name, tensor in state.items()}


def materialize_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer create its state, for a checkpoint to be read into, by a step that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate, decay in zip(optimizer.param_groups, rates, decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
