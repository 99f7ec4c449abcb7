"""How often each expert was chosen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from titan_lite.models.module import Module
from titan_lite.models.spec import Spec


def counts(experts: Tensor, n_experts: int) -> Tensor:
    """How often each expert number occurs in each row of (rows, M): (rows, E), float32."""
    rows = len(experts)
    first = torch.arange(rows, device=experts.device)[:, None] * n_experts
    zeros = torch.zeros(rows * n_experts, device=experts.device)
    chosen = (experts + first).flatten()
    return zeros.index_add_(0, chosen, torch.ones_like(chosen, dtype=zeros.dtype)).view(rows, n_experts)


class Tally(Module):
    """Counts the experts chosen in the micro-batches of a training step, on this rank.

    Where a compiled block recomputes activations, each choice may count twice: read shares and ratios, not numbers.
    """

    weighs_tokens: ClassVar[bool] = True
    count: Tensor
    """(E,) float32, of the step so far."""

    def __init__(self, n_experts: int):
        super().__init__()
        self.n_experts = n_experts
        self.register_buffer("count", torch.empty(n_experts, dtype=torch.float32))
        self.last: Tensor | None = None

    def add(self, experts: Tensor) -> None:
        """Counts expert numbers of any shape.

        Not in backward, where activations are recomputed: once, or for each part of a backward that is split, which is
        that of some micro-batches of a pipeline's run and not of others.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.count.add_(counts(experts.flatten()[None], self.n_experts)[0])

    def close(self) -> Tensor:
        """Ends the step: returns its count (E,), which stays readable as `last`, and starts again from 0."""
        self.last = self.count.clone()
        self.count.zero_()
        return self.last

    def param_specs(self) -> dict[str, Spec]:
        return {"count": Spec("scalar", 1, self.n_experts, 0.0)}
