"""Activation checkpointing: what a block keeps for backward and what it computes again. Source: arXiv 1604.06174."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_lite.models.transformer import Transformer
from titan_lite.parallel.config import ActivationCheckpoint

MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten._scaled_mm.default: 1,
    torch.ops.titan_lite.grouped_mm.default: 1,
}
"""Of linear layers without and with a bias, in float8, and of a layer's experts; with the weight's place among the
arguments. Most of the time, and results as wide as the layer: every second one is kept, which halves both what is kept
and what is computed again. Layers named by `per_op_sac_force_recompute_mm_shapes_by_fqns` are left out of the count:
their product is computed again, as is that of any layer with a weight of the same shape (a product does not know its
layer). That pays for small products whose result would be kept in place of a large one's, such as a router's."""

SAVED_OPS = {
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
"""Kept always. Fused attention, under the name it has on each device: its time grows with the square of the sequence,
its result does not. Collectives whose result is small beside the time that all ranks would wait for it once more.

Everything else is computed again: norms, activations, rotations, masks and the scores of unfused attention, which take
little time for their size."""


def apply_activation_checkpointing(
    model: Transformer, config: ActivationCheckpoint, compiled_on_cpu: bool = False
) -> None:
    """Makes the chosen blocks recompute in backward, in place; parameter names stay as they are.

    A block that is compiled for the CPU and has parameters spread over ranks keeps what may be random in it, which is
    fused attention: AOTAutograd (torch 2.13) hands the state of a CPU's generator to the graph of backward where it
    looks for the parameters' mesh. A GPU's state takes another way.
    """
    chosen, shared = _chosen(model.executed(), config), getattr(model.stack, "shared", nn.Module())
    for path, block in model.blocks().items():
        if path in chosen:
            parameters = itertools.chain(block.parameters(), shared.parameters())
            keep_random = compiled_on_cpu and any(isinstance(p, DTensor) for p in parameters)
            block.forward = _checkpointed(block.forward, _keywords(model, path, block, config, keep_random))


def draw_memory_budgets(config: ActivationCheckpoint, folder: Path) -> None:
    """Has the compiler draw the time that each memory budget costs, one picture per graph, where that is asked for."""
    if config.mode == "memory_budget" and config.visualize_memory_budget_pareto:
        settings: Any = torch._functorch.config
        settings.visualize_memory_budget_pareto = True
        settings.memory_budget_pareto_dir = str(folder / "memory_budget_pareto")
        settings.enable_autograd_cache = False  # a graph out of the cache is not partitioned, and not drawn


def _chosen(executed: Sequence[str], config: ActivationCheckpoint) -> set[str]:
    """The paths of the blocks to checkpoint."""
    if config.mode in ("none", "memory_budget"):  # the latter is the compiler's to keep: see compile.py
        return set()
    if config.mode == "selective" and config.selective_ac_option != "op":
        every = int(config.selective_ac_option)
        return set(executed[every - 1 :: every])
    return set(executed)


def _keywords(
    model: Transformer, path: str, block: nn.Module, config: ActivationCheckpoint, keep_random: bool
) -> dict[str, Any]:
    """What torch's checkpoint of a block is called with."""
    keywords: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }
    if config.mode == "selective" and config.selective_ac_option == "op":
        patterns = config.per_op_sac_force_recompute_mm_shapes_by_fqns
        shapes = _weight_shapes(path, block, patterns)
        shapes |= _weight_shapes("stack.shared", getattr(model.stack, "shared", nn.Module()), patterns)
        keywords["context_fn"] = partial(_per_op_contexts, shapes, keep_random)
    elif keep_random:
        keywords["context_fn"] = _random_kept_contexts
    return keywords


def _checkpointed(forward: Callable[..., Any], keywords: dict[str, Any]) -> Callable[..., Any]:
    """`forward` under checkpoint. Replacing the bound method, not wrapping the module, keeps parameter names."""

    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, **keywords)

    return checkpointed


def _weight_shapes(path: str, block: nn.Module, patterns: Sequence[str]) -> set[torch.Size]:
    """Shapes (d_in, d_out) of the matrices of the block at `path` whose full name contains one of `patterns`."""
    matrices = ((f"{path}.{name}", module) for name, module in block.named_modules() if isinstance(module, nn.Linear))
    return {module.weight.t().shape for name, module in matrices if any(pattern in name for pattern in patterns)}


def _per_op_contexts(recomputed_shapes: set[torch.Size], keep_random: bool) -> tuple[Any, Any]:
    counter = itertools.count()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if keep_random and _is_random(op):
            return CheckpointPolicy.MUST_SAVE
        if (weight := MATRIX_PRODUCTS.get(op)) is None:
            return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
        if args[weight].shape in recomputed_shapes or next(counter) % 2:
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


def _random_kept_contexts() -> tuple[Any, Any]:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if _is_random(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _is_random(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
