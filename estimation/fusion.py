"""A graph of operations as a compiler runs it, on tensors that have shapes and no content.

Elementwise operations and reductions that follow each other run as one kernel, and what they hand to each other never
exists in memory. What does: results that a matrix product, attention, a collective or another library's kernel reads,
results of reductions and scatters, and what leaves the graph. A kernel writes into a buffer of equal size that it is
the last to read. This is how torch's inductor schedules; where it gives up on fusing, more exists than here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from estimation.ops import Op
from estimation.trace import note, recomputing

ELEMENTWISE = {"cat", "full", "full_like", "embedding", "gather", "index", "_unsafe_index", "iota", "arange", "copy"}
ELEMENTWISE |= {"slice_scatter", "select_scatter", "constant_pad_nd", "flip", "rand", "randn", "scalar_tensor", "fill"}
"""Operations without torch's tag for it of which each result is computed by itself too."""

IN_MEMORY = {"index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce", "cumsum"}
"""Operations that run in a kernel with others, but for their result, which they make in memory."""


COLLECTIVES = ("all_", "reduce_scatter", "broadcast")
RNG_STATE_BYTES = 16
"""Of a CUDA generator: seed and offset."""


class Fused:
    """What runs a graph. Takes its inputs as one list, which it empties: the last reader of an input frees it."""

    _boxed_call = True  # the way in which torch hands inputs to compiled graphs

    def __init__(self, module: fx.GraphModule, again: Collection[str]):
        """`again`: names of nodes that compute once more what a graph before has computed."""
        self.module, self.again = module, again
        self.nodes = list(module.graph.nodes)
        self.run: dict[fx.Node, Callable[..., Any] | None] = {}
        for node in self.nodes:
            self.run[node] = self._way_of(node)
        self.root = {node: self._root(node) for node in self.nodes}
        last: dict[fx.Node, int] = {}
        for index, node in enumerate(self.nodes):
            for read in (node, *self._reads(node)):
                last[self.root[read]] = index
        self.dying: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node in self.nodes:
            self.dying[last[self.root[node]]].append(node)

    def __call__(self, inputs: list[Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter(list(inputs))
        inputs.clear()
        for index, node in enumerate(self.nodes):
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            elif (way := self.run[node]) is not None:
                values[node] = way(node, values, index)
            for dead in self.dying[index]:
                values.pop(dead, None)
        raise AssertionError("a graph ends with its output")

    # ---- how a node runs

    def _way_of(self, node: fx.Node) -> Callable[..., Any] | None:
        """None for what never exists by itself, and for what does not run."""
        if node.op == "get_attr":
            return self._constant
        if node.op != "call_function":
            return None
        if _is_view(node):
            return None if self._never_there(node) else self._library
        if _is_elementwise(node):
            return self._kernel if _is_needed(node) else None
        if _name(node) in IN_MEMORY or _is(node, torch.Tag.reduction):
            return self._kernel
        return self._library

    def _never_there(self, view: fx.Node) -> bool:
        base = view.all_input_nodes[0]
        return self.run[base] is None and base.op == "call_function"

    def _constant(self, node: fx.Node, values: dict[fx.Node, Any], index: int) -> Any:
        return operator.attrgetter(str(node.target))(self.module)

    def _library(self, node: fx.Node, values: dict[fx.Node, Any], index: int) -> Any:
        filled: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = filled
        run: Any = node.target
        with recomputing(node.name in self.again):
            if run is run_and_save_rng_state:  # attention under a checkpoint, which may draw
                return torch.empty(RNG_STATE_BYTES, dtype=torch.uint8), args[0](*args[1:], **kwargs)
            if run is run_with_rng_state:
                return args[1](*args[2:], **kwargs)
            return run(*args, **kwargs)

    def _kernel(self, node: fx.Node, values: dict[fx.Node, Any], index: int) -> Any:
        like, *others = _results(node)
        leaves = list(dict.fromkeys(self._reads(node)))
        nbytes = sum(_nbytes(leaf) for leaf in (node, *leaves))
        note(Op(_name(node), "pointwise", like.dtype, 0, nbytes, "", node.name in self.again))
        if others:  # a mean and a variance
            return tuple(torch.empty_strided(x.size(), x.stride(), dtype=x.dtype) for x in (like, *others))
        for leaf in leaves:
            if self._overwritable(leaf, index) and _nbytes(leaf) == _nbytes(node):
                old: Tensor = values[leaf]
                if old.dtype == like.dtype and old.untyped_storage().nbytes() == _nbytes(node):
                    return old.as_strided(like.size(), like.stride(), 0)
        return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)

    def _overwritable(self, leaf: fx.Node, index: int) -> bool:
        root = self.root[leaf]
        ours = root.op == "call_function" and not _name(root).startswith(COLLECTIVES)
        return ours and root in self.dying[index]

    # ---- what a node reads

    def _reads(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that exist, through those that do not."""
        if node.op != "output" and self.run[node] is None:
            return
        for read in node.all_input_nodes:
            yield from self._that_exist(read, set())

    def _that_exist(self, node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
        if node in seen:
            return
        seen.add(node)
        if self.run[node] is not None or node.op == "placeholder":
            yield node
        else:
            for read in node.all_input_nodes:
                yield from self._that_exist(read, seen)

    def _root(self, node: fx.Node) -> fx.Node:
        """The node whose memory this one looks at."""
        while node.op == "call_function" and _is_view(node):
            node = node.all_input_nodes[0]
        return node


def _is(node: fx.Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, OpOverload) and tag in node.target.tags


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, OpOverload) else str(target)


def _is_view(node: fx.Node) -> bool:
    waits = _name(node) == "wait_tensor"  # the collective's own result
    return node.target is operator.getitem or waits or (isinstance(node.target, OpOverload) and node.target.is_view)


def _is_elementwise(node: fx.Node) -> bool:
    return _is(node, torch.Tag.pointwise) or _name(node) in ELEMENTWISE or _is_one_hot(node)


def _is_one_hot(node: fx.Node) -> bool:
    """One number into rows of another, as in the gradient of a cross entropy: inductor compares indices instead."""
    if node.target is not torch.ops.aten.scatter.value:
        return False
    onto = node.args[0]
    return isinstance(onto, fx.Node) and _name(onto) == "full"


def _is_needed(node: fx.Node) -> bool:
    """Whether something reads it that is not part of a kernel of elementwise operations."""
    for user in node.users:
        if user.op == "call_function" and _is_view(user):
            if _is_needed(user):
                return True
        elif user.op != "call_function" or not (
            _is_elementwise(user) or _name(user) in IN_MEMORY or _is(user, torch.Tag.reduction)
        ):
            return True
    return False


def _results(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [each for each in (value if isinstance(value, tuple | list) else [value]) if isinstance(each, Tensor)]


def _nbytes(node: fx.Node) -> int:
    return sum(value.numel() * value.element_size() for value in _results(node))
