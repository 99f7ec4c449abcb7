"""Activation checkpointing: what a block keeps for backward and what it computes again. Source: arXiv 1604.06174."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_lite.models.transformer import Transformer
from titan_lite.parallel.config import ActivationCheckpoint

SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""What `selective` with option `op` keeps: communication, attention, and every second matrix product."""


def apply_activation_checkpointing(model: Transformer, config: ActivationCheckpoint) -> None:
    """Makes the chosen blocks recompute in backward, in place; parameter names stay as they are."""
    if config.mode == "none":
        return
    if config.mode == "selective" and config.selective_ac_option != "op":
        every = int(config.selective_ac_option)
        chosen = set(model.executed()[every - 1 :: every])
    else:
        chosen = set(model.executed())
    for path, block in model.blocks().items():
        if path not in chosen:
            continue
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
            keywords["context_fn"] = partial(_per_op_contexts, shapes)
        block.forward = _checkpointed(block.forward, keywords)


def _checkpointed(forward: Callable[..., Any], keywords: dict[str, Any]) -> Callable[..., Any]:
    """`forward` under checkpoint. Replacing the bound method, not wrapping the module, keeps parameter names."""

    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, **keywords)

    return checkpointed


def _weight_shapes(path: str, block: nn.Module, patterns: Sequence[str]) -> set[torch.Size]:
    """Shapes (d_in, d_out) of the matrices of the block at `path` whose full name contains one of `patterns`."""
    matrices = ((f"{path}.{name}", module) for name, module in block.named_modules() if isinstance(module, nn.Linear))
    return {module.weight.t().shape for name, module in matrices if any(pattern in name for pattern in patterns)}


def _per_op_contexts(recomputed_shapes: set[torch.Size]) -> tuple[Any, Any]:
    counts: dict[str, int] = defaultdict(int)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            if args[1].shape in recomputed_shapes:
                return CheckpointPolicy.PREFER_RECOMPUTE
            phase = "recompute" if context.is_recompute else "forward"
            counts[phase] += 1
            return CheckpointPolicy.PREFER_RECOMPUTE if counts[phase] % 2 == 0 else CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
