"""The norm of all gradients, however they are spread over ranks, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_gradients(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    stages: DeviceMesh | None,
    copies: Collection[nn.Parameter] = (),
) -> Tensor:
    """Scales the gradients so that their Euclidean norm is at most `max_norm`; returns what it was, on every rank.

    Parameters of one mesh are summed over it; `stages` is the axis along which ranks have different parameters, if
    there is one. A parameter that several ranks hold counts once where it is a DTensor that says so. `copies` are
    those that count on another stage.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [_whole(get_total_norm(_gradients(group, copies))) for group in by_mesh.values()]
    # A stage may be frozen as a whole.
    norms = norms or [torch.zeros((), device=parameters[0].device)]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if stages is not None:
        squared = norm.square()
        dist.all_reduce(squared, group=stages.get_group())
        norm = squared.sqrt()
    for group in by_mesh.values():  # torch multiplies no tensors of different meshes at once
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _gradients(parameters: Iterable[nn.Parameter], copies: Collection[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None and p not in copies]


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
