"""Functions as torch.compile runs them, in a fake world: one graph forward and one backward.

The graphs are torch's own: AOTAutograd traces the function, and its min-cut partitioner chooses what is kept for
backward, by checkpoints or a memory budget where there are such. `fusion.py` then runs them as inductor would.
Not as there: Dynamo does not take part, so that a function must be one graph, which `fullgraph` asks for too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
import torch.fx.traceback
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

import titan_lite.parallel.activation as activation
from estimation.fusion import Fused
from estimation.instead import instead
from estimation.kernels import composite_kernels
from estimation.trace import paused

SMALL = 2**16
"""Bytes that a graph may hold of what is no input of it: tables and seeds."""


@dataclass
class Graphs:
    """What is compiled, by what it is compiled for."""

    budget: float
    """Share of the activations of blocks that is kept: `activation_checkpoint.memory_budget`, or 1."""
    found: dict[Hashable, Compiled] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Name of a function that is no one graph here -> why."""


class Region:
    """A function that is compiled when it is first called with arguments of some shapes."""

    def __init__(self, name: str, kind: Hashable, function: Callable[..., Any], module: nn.Module, graphs: Graphs):
        """`kind`: what is equal for functions that can share graphs. `module` holds the parameters it uses."""
        self.name, self.kind, self.function, self.module, self.graphs = name, kind, function, module, graphs

    def __call__(self, *args: Any) -> Any:
        if self.name in self.graphs.failures:
            return self.function(*args)
        leaves, structure = pytree.tree_flatten(args)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places] + list(self._weights())
        key = (self.kind, torch.is_grad_enabled(), structure, *map(_look, tensors))
        compiled = self.graphs.found.get(key)
        if compiled is None:
            compiled = Compiled(self.graphs.budget)
            try:
                with paused():
                    compiled.trace(self._pure(leaves, places, structure, compiled), tensors)
            except Exception as error:  # whatever keeps torch from tracing it
                self.graphs.failures[self.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                return self.function(*args)
            self.graphs.found[key] = compiled
        return pytree.tree_unflatten(compiled.run(*tensors), compiled.structure)

    def _weights(self) -> Iterator[Tensor]:
        """What modules read as their parameters: under tensor parallelism this rank's part."""
        for module, name in _slots(self.module):
            yield getattr(module, name)

    def _pure(self, leaves: list[Any], places: list[int], structure: Any, compiled: Compiled) -> Callable[..., Any]:
        """The function of tensors alone. It is called while it is traced, and not again."""

        def pure(*tensors: Tensor) -> list[Any]:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=False):
                filled[place] = tensor
            with _in_place_of(self.module, tensors[len(places) :]):
                results = self.function(*pytree.tree_unflatten(filled, structure))
            flat, compiled.structure = pytree.tree_flatten(results)
            return flat

        return pure


class Compiled:
    """A function's graphs, and what runs them."""

    run: Callable[..., Any]
    structure: Any = None
    """Of the results."""

    def __init__(self, budget: float):
        self.budget = budget

    def trace(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        """Traces without running anything; raises whatever torch raises."""
        again: set[str] = set()

        def forward(gm: fx.GraphModule, example_inputs: Any) -> Fused:
            held = [value for value in _constants(gm) if value.nbytes > SMALL]
            assert not held, "holds tensors that are none of its arguments"
            return Fused(gm, again=())

        def backward(gm: fx.GraphModule, example_inputs: Any) -> Fused:
            return Fused(gm, again)

        def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **keywords: Any) -> Any:
            again.update(_forward_names(joint, num_fwd_outputs))
            with torch._functorch.config.patch(activation_memory_budget=self.budget):
                return min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **keywords)

        decompositions = select_decomp_table()
        self.run = aot_function(function, forward, backward, partition, decompositions, inference_compiler=forward)
        with composite_kernels(), _tagged_checkpoints():
            _first_call(self.run, tensors)


def _first_call(run: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Compiles forward and backward; what it computes is dropped."""
    results = [result for result in run(*tensors) if isinstance(result, Tensor) and result.requires_grad]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if results and wanted:
        torch.autograd.grad(results, wanted, [torch.empty_like(r) for r in results], allow_unused=True)


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                yield each, name


@contextmanager
def _in_place_of(module: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Modules read `tensors` as their parameters."""
    before: list[Any] = []
    for (each, name), tensor in zip(_slots(module), tensors, strict=True):
        before.append((each, name, each._parameters[name]))
        each._parameters[name] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for each, name, parameter in before:
            each._parameters[name] = parameter


@contextmanager
def _tagged_checkpoints() -> Iterator[None]:
    """Checkpoints as tags on the operations of a graph, for the partitioner."""
    numbers = itertools.count(1)

    def checkpoint(function: Callable[..., Any], *args: Any, context_fn: Any = None, **_: Any) -> Any:
        meta = {"ac_graph_id": next(numbers), "recompute": CheckpointPolicy.PREFER_RECOMPUTE}
        with ExitStack() as stack:
            stack.enter_context(torch.fx.traceback.preserve_node_meta())
            stack.enter_context(_noted(meta))
            if context_fn is not None:
                recording, _again = context_fn()
                recording.ac_graph_id = meta["ac_graph_id"]
                stack.enter_context(recording)
            return function(*args)

    with instead(activation, checkpoint=checkpoint):
        yield


@contextmanager
def _noted(meta: dict[str, Any]) -> Iterator[None]:
    """Inside, operations that are traced have `meta` among what is known of them."""
    current = torch.fx.traceback.current_meta
    before = dict(current)
    current.update(meta)
    try:
        yield
    finally:
        current.clear()
        current.update(before)


def _forward_names(joint: fx.GraphModule, n_outputs: int) -> set[str]:
    """Of all nodes that the forward's results come from."""
    (results,) = (node.args[0] for node in joint.graph.find_nodes(op="output"))
    waiting = [node for node in list(results)[:n_outputs] if isinstance(node, fx.Node)]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return {node.name for node in found}


def _constants(module: fx.GraphModule) -> Iterator[Tensor]:
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target), None)
        if isinstance(value, Tensor):
            yield value


def _look(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
