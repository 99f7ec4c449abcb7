"""The collectives that torch's dispatcher sees, in order: what they are, how many bytes, over how many ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}
"""c10d's names in ours; others keep theirs, so that an unexpected one shows."""

NO_COLLECTIVES = {"_wrap_tensor_autograd", "wait_tensor"}


class Collective(NamedTuple):
    """One call."""

    kind: str
    bytes: int
    """Of the larger side: all that is gathered, or what is reduced before it is scattered."""
    ranks: int
    """In the group."""


def _group(arguments: list[Any]) -> ProcessGroup:
    """c10d's collectives get their group as the first boxed argument, functional ones by its name, the last string."""
    if names := [argument for argument in arguments if isinstance(argument, str)]:
        return _resolve_process_group(names[-1])
    return ProcessGroup.unbox(next(argument for argument in arguments if isinstance(argument, torch.ScriptObject)))


class Collectives(TorchDispatchMode):
    """Records every collective between `__enter__` and `__exit__`, those of backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own dispatch comes first: what it calls comes back here
        if func.namespace in ("c10d", "_c10d_functional") and func.overloadpacket.__name__ not in NO_COLLECTIVES:
            leaves = tree_leaves((args, kwargs))
            ranks = _group(leaves).size()
            largest = max((leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)), default=0)
            name = func.overloadpacket.__name__
            self.calls.append(Collective(KINDS.get(name, name), largest, ranks))
        return func(*args, **(kwargs or {}))
