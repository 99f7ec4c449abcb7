"""Hooks: what a run tells the outside. The trainer calls them and knows nothing of files, consoles or formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RunFacts:
    """What is known when training is about to start."""

    description: str
    """What the user calls the run."""
    model: str
    """Name for people, such as "llama3 debugmodel"."""
    parameters: int
    parameters_without_embedding: int
    flops_per_token: float
    """Forward and backward, of the whole model."""
    layout: str
    """The parallel layout in words, such as "FSDP 8"."""
    kernels: str
    """What computes the attention, such as "sdpa" or, with how many attentions each, "flex x 5, sdpa x 1"."""
    device: str
    """Name of one device, as `device_name` gives it."""
    peak_flops: float | None
    """Dense bf16 peak of one device in FLOP/s; None where unknown."""
    world_size: int
    dp_size: int
    local_batch_size: int
    global_batch_size: int
    accumulation: int
    """Micro-batches per optimizer step."""
    seq_len: int
    steps: int
    """The last step of the run."""
    start_step: int
    """Steps already done: 0, or the step of the checkpoint resumed from."""
    data: str
    """The training data in words."""
    dump_folder: Path
    warnings: tuple[str, ...] = ()
    """One line each, shown once."""
    active_parameters: int | None = None
    """Those that work on a token, where not all do."""
    remembered_bytes: int = 0
    """On each rank, of what its rows remember of the steps before."""
    resting_bytes: Callable[[], int] = int
    """On each rank, of parameters, buffers, optimizer states and memory on its device; asked between two steps."""
    resumed_from: str | None = None
    run_id: str = ""
    """Stays the same over resumes."""


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of one step, on the host."""

    loss: float
    grad_norm: float
    extra: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step. Tensors stay on the device until somebody calls `read`."""

    step: int
    """Counted from 1."""
    loss: torch.Tensor | float
    """Mean over the step's global batch, nats per token."""
    grad_norm: torch.Tensor | float
    """Before clipping."""
    lr: float
    tokens_seen: int
    """Since the first step of the run, over all ranks."""
    tokens: int
    """Of this step, over all ranks."""
    data_seconds: float
    """Wait for the batch."""
    step_seconds: float
    """From asking for the batch to the optimizer step issued; a device may still be computing."""
    work: float = 1.0
    """FLOPs per token, in units of RunFacts.flops_per_token: steps of some models differ."""
    extra: Callable[[], Mapping[str, torch.Tensor | float]] = dict
    """Asked for what features add to the logged line; may be a collective, so all ranks read the same steps."""

    def read(self) -> StepNumbers:
        """The step's numbers; waits for the device, so only for steps that are shown."""
        return StepNumbers(
            loss=_number(self.loss),
            grad_norm=_number(self.grad_norm),
            extra={name: _number(value) for name, value in self.extra().items()},
        )


@dataclass(frozen=True)
class ValidationResult:
    """One pass over the validation data."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int
    """Over all ranks."""
    seconds: float
    extra: Mapping[str, float] = field(default_factory=dict)
    """What the objective adds."""


class Hook:
    """Does nothing at every point of a run; subclasses override what they want to see. Called on every rank alike."""

    def on_start(self, facts: RunFacts) -> None:
        """Called once, before the first step."""

    def on_step(self, result: StepResult) -> None:
        """Called after every optimizer step; must not wait for the device unless it shows the step."""

    def on_validation(self, result: ValidationResult) -> None:
        """Called after every validation pass."""

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Called after every save that training waited `seconds` for."""

    def on_end(self, reason: str) -> None:
        """Called once after `on_start`, however the run ends: "completed", "stopped: ..." or "failed"."""


class HookList(Hook):
    """Several hooks as one. Only those that were started are ended, so it may be ended at any time."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = tuple(hooks)
        self._started: list[Hook] = []

    def on_start(self, facts: RunFacts) -> None:
        for hook in self.hooks:
            hook.on_start(facts)
            self._started.append(hook)

    def on_step(self, result: StepResult) -> None:
        for hook in self.hooks:
            hook.on_step(result)

    def on_validation(self, result: ValidationResult) -> None:
        for hook in self.hooks:
            hook.on_validation(result)

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        for hook in self.hooks:
            hook.on_checkpoint(step, path, seconds)

    def on_end(self, reason: str) -> None:
        # Every hook gets to close its files, even where another one fails.
        with ExitStack() as stack:
            for hook in reversed(self._started):
                stack.callback(hook.on_end, reason)


def _number(value: torch.Tensor | float) -> float:
    return value if isinstance(value, (int, float)) else value.item()
