"""Branches of several layers that multiply with the same matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import Tensor, nn

from titan_lite.models.block import Block
from titan_lite.models.context import Context
from titan_lite.models.module import Module
from titan_lite.models.spec import Role

MATRICES: Final[tuple[Role, ...]] = ("hidden", "expert", "router")
"""Roles of what is shared: gains, scales and the like stay with the layer that executes them."""

Run = Callable[[Tensor, Context], tuple[Tensor, dict[str, Tensor]]]
"""A block, or a block inside holders."""


class Holder(nn.Module):
    """The matrices of a branch that several layers use, under the names that they have in the branch.

    A layer runs inside `forward`: a holder that is sharded is gathered around the whole layer, which can be one graph.
    """

    def forward(self, run: Run, x: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return run(x, context)


class Same(nn.Module):
    """What another module does, whose parameters stay that one's."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that its parameters are not registered here too

    def forward(self, *args: Any) -> Any:
        return self._owner[0](*args)

    @property
    def weight(self) -> Any:
        """The owner's matrix, for a part that does more than multiply by it (`MLA`). Within a forward."""
        return self._owner[0].weight


def share(holder: Holder, block: Block, branch: str) -> None:
    """Makes the block's branch use the matrices of `holder`; its own ones go there if they are the first."""
    own: nn.Module = block.get_submodule(branch)
    for path in list(_with_matrices(own)):
        # A branch that is one such part as a whole has no path in itself.
        place = path or "whole"
        if not _has(holder, place):
            _put(holder, place, own.get_submodule(path))
        same = Same(holder.get_submodule(place))
        if path:
            _put(own, path, same)
        else:
            _put(block, branch, same)


def _with_matrices(module: nn.Module, path: str = "") -> Iterator[str]:
    """Paths of the outermost parts that hold a matrix themselves."""
    specs = module.param_specs() if isinstance(module, Module) else {}
    if any(spec.role in MATRICES for spec in specs.values()):
        yield path
        return
    for name, child in module.named_children():
        yield from _with_matrices(child, f"{path}.{name}" if path else name)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    """Registers `part` at `path`, making what is on the way where it is not there."""
    *parents, name = path.split(".")
    for parent in parents:
        if not _has(module, parent):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.add_module(name, part)
