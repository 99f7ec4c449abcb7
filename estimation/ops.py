"""One operation's work: floating-point operations, bytes moved, and bytes sent over which ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import titan_lite.models.ffn.moe.experts  # noqa: F401  # registers the operation

aten = torch.ops.aten
grouped_mm = torch.ops.titan_lite.grouped_mm


class Op(NamedTuple):
    """What one operation costs, apart from storages."""

    name: str
    kind: str
    """matmul, attention, pointwise (and whatever else is bound by memory), or collective."""
    dtype: torch.dtype
    flops: int
    nbytes: int
    """Read and written; for a collective, those of its largest tensor."""
    group: str
    """Name of the process group of a collective."""
    recompute: bool = False
    """Whether backward computes here once more what forward has computed."""
    done: float = 1.0
    """Share of the FLOPs that a kernel does: those of scores that a causal mask hides are left out."""


NEXT_MICRO_BATCH = Op("next micro-batch", "mark", torch.float32, 0, 0, "")
"""Stands in a trace where a micro-batch begins, and costs nothing."""

_VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"}
_VIEWS |= {"detach", "alias", "split", "split_with_sizes", "as_strided", "unbind", "empty", "empty_like", "unflatten"}
_VIEWS |= {"new_empty", "empty_strided", "_reshape_alias", "diagonal", "narrow", "chunk", "lift_fresh", "resize_"}


def op_of(func: Any, args: Any, kwargs: Any, result: Any) -> Op | None:
    """The work of a dispatched call; None for what moves nothing."""
    name = func._schema.name.split("::")[1]
    space = func.namespace
    if space in ("c10d", "_c10d_functional"):
        return None if name in ("wait_tensor", "barrier") else _collective(name, args, kwargs, result)
    if name in _VIEWS or space == "prim":
        return None
    tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
    if not tensors:
        return None
    packet = func._overloadpacket
    flops = int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
    kind = "attention" if "attention" in name else "matmul" if flops else "pointwise"
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    done = _seen(func._schema, args, kwargs) if kind == "attention" else 1.0
    return Op(name, kind, tensors[0].dtype, flops, nbytes, "", done=done)


def _seen(schema: torch.FunctionSchema, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Share of the scores that a fused attention's own causal mask leaves."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    if not given.get("is_causal", False):
        return 1.0
    n_queries, n_keys = given["query"].shape[-2], given["key"].shape[-2]
    triangle = min(n_queries, n_keys)
    return (triangle * (triangle + 1) / 2 + (n_queries - triangle) * n_keys) / (n_queries * n_keys)


def _collective(name: str, args: Any, kwargs: Any, result: Any) -> Op:
    tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
    largest = max((t.numel() * t.element_size() for t in tensors), default=0)
    named = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.ScriptObject))]
    group = ""
    for value in named:
        group = value if isinstance(value, str) else _group_name(value)
        if group not in ("sum", "avg", "max", "min", "product"):
            break
    dtype = tensors[0].dtype if tensors else torch.float32
    return Op(name.strip("_"), "collective", dtype, 0, largest, group)


def _group_name(boxed: torch.ScriptObject) -> str:
    try:
        return torch.distributed.ProcessGroup.unbox(boxed).group_name
    except RuntimeError:  # a ReduceOp or a Work is no group
        return ""


def _flash_on_cpu(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _flash_on_cpu_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _grouped(a: Any, b: Any, ends: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Of the products of all experts: of rows (N, K) each with its matrix (K, M), or of (K, N) and (N, M) in parts."""
    return 2 * int(a.numel()) * int(b.shape[-1])


for _op, _count in (
    (grouped_mm, _grouped),
    (aten._scaled_dot_product_flash_attention_for_cpu, _flash_on_cpu),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward, _flash_on_cpu_backward),
):
    flop_registry.setdefault(_op, _count)
