"""FLOPs per token by formula: 6 per parameter of a matrix, plus attention scores (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from torch import nn

from titan_lite.models.attention import Attention, HeadAttention
from titan_lite.models.context import Iterations
from titan_lite.models.spec import Spec
from titan_lite.models.stack import Executions
from titan_lite.models.transformer import Transformer

MATRIX_ROLES = ("hidden", "head", "expert", "router")


def training_flops_per_token(
    model: Transformer,
    specs: dict[str, Spec],
    seq_len: int,
    iterations: Iterations | None = None,
    logits: float = 1.0,
) -> int:
    """Forward and backward FLOPs per token: 2 per weight in matrices, plus scores over the full row, each time they
    run; and twice that each time backward goes through them.

    Of a recurrent stack with these `iterations`; without them, on average over steps. `logits`: what part of the tokens
    the objective makes next-token logits of.
    """
    several = model.stack.executions(iterations)
    runs: dict[nn.Parameter | nn.Module, int | float] = {}
    for unit, executions in several.items():
        runs |= dict.fromkeys((*unit.parameters(), *unit.modules()), _passes(executions))
    once = _passes(Executions(1, 1))
    ends = [*model.head.parameters(), *([model.embedding.get_parameter("weight")] if model.tied else [])]
    runs |= dict.fromkeys(ends, once * (logits + model.mtp.depth))
    # Rows of an embedding (fan_in 1) are looked up: no product, but where a tied head makes it one.
    matrices = {n for n, s in specs.items() if s.role in MATRIX_ROLES or (s.role == "embed" and s.fan_in > 1)}
    if model.tied:
        matrices.add("embedding.weight")
    matrices.discard("head.reward.weight")  # multiplied with one state of each text
    parameters = dict(model.named_parameters())
    flops = sum(2 * round(parameters[n].numel() * specs[n].used) * runs.get(parameters[n], once) for n in matrices)
    for module in model.modules():
        if isinstance(module, Attention):
            flops += module.score_flops_per_token(seq_len) * runs.get(module, once)
    return round(flops)


def anew_flops_per_token(model: Transformer, anew: float) -> int:
    """Forward and backward FLOPs per token of keys and values that are made again of `anew` remembered tokens.

    Backward goes to the weights, and not on to what is remembered: twice the forward in all.
    """
    runs = {m: n.forward for unit, n in model.stack.executions().items() for m in unit.modules()}
    attentions = (module for module in model.modules() if isinstance(module, HeadAttention))
    return round(sum(2 * anew * module.key_value_flops_per_token() * runs.get(module, 1) for module in attentions))


def relative_flops(
    model: Transformer, specs: dict[str, Spec], seq_len: int, logits: float, iterations: Iterations | None
) -> float:
    """FLOPs of a training step that ran so many iterations, in units of those that are expected on average."""
    if iterations is None:
        return 1.0
    expected = training_flops_per_token(model, specs, seq_len, logits=logits)
    return training_flops_per_token(model, specs, seq_len, iterations, logits) / expected


def _passes(executions: Executions) -> int | float:
    """In units of a forward: a backward costs two."""
    return executions.forward + 2 * executions.graded


def active_parameters(model: nn.Module, specs: dict[str, Spec]) -> int:
    """Parameters that work on a token: of experts those that it chose, on average; all others are counted whole."""
    return round(sum(p.numel() * min(specs[name].used, 1.0) for name, p in model.named_parameters()))
