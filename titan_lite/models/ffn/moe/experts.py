"""Many feed-forward networks of one shape, their matrices stacked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveFloat, PositiveInt
from titan_lite.models.activation import Activation, activation
from titan_lite.models.module import OnTokens
from titan_lite.models.spec import Spec
from titan_lite.parallel.plan import SPLIT_DEGREE, ExpertPlan, divisors, nearest

if TYPE_CHECKING:
    from titan_lite.job import Job

ALIGNED = 8
"""Rows must begin at multiples of 16 bytes in the grouped product: of 8 bfloat16."""


def _aligned(value: int) -> int:
    if value % ALIGNED:
        raise ValueError(f"must be a multiple of {ALIGNED}: the grouped product reads so many numbers at a time")
    return value


class Experts(OnTokens):
    """Tokens sorted by expert (M, D) and where each expert's end (E,) -> (M, D)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "experts"
        default_type: ClassVar[str | None] = "glu"
        hidden: Annotated[PositiveInt, AfterValidator(_aligned)] = 256
        """Inner width F of each expert, a multiple of 8."""
        bias: bool = False
        """Biases on all three matrices."""

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            parts = job.parallelism.expert_tensor_parallel_degree
            if self.hidden % (ALIGNED * parts):
                why = f"is split over ranks, and {SPLIT_DEGREE} = {parts} does not cut it into multiples of {ALIGNED}, "
                why += "which the grouped product wants"
                legal = (
                    f"{nearest(self.hidden, ALIGNED * parts)}, or {SPLIT_DEGREE} = {divisors(self.hidden // ALIGNED)}"
                )
                yield Problem(CROSS_FIELD, ".hidden", why, self.hidden, legal)
            if job.model.dim % ALIGNED:
                why = (
                    f"does not work with model.dim = {job.model.dim}: the grouped product wants a multiple of {ALIGNED}"
                )
                yield Problem(CROSS_FIELD, ".hidden", why, self.hidden, f"model.dim = a multiple of {ALIGNED}")

    def __init__(self, config: Config, dim: int, n_experts: int, top_k: int):
        super().__init__()
        self.widths = {"gate": (dim, config.hidden), "up": (dim, config.hidden), "down": (config.hidden, dim)}
        self.used = top_k / n_experts
        for name, (d_in, d_out) in self.widths.items():
            self.register_parameter(name, nn.Parameter(torch.empty(n_experts, d_in, d_out)))
            bias = nn.Parameter(torch.empty(n_experts, d_out)) if config.bias else None
            self.register_parameter(f"{name}_bias", bias)

    gate: Tensor
    """(E, D, F), as `up`."""
    up: Tensor
    down: Tensor
    """(E, F, D)."""
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """The inner activations (M, F) of the two projections."""
        raise NotImplementedError

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        gate = grouped_linear(x, self.gate, self.gate_bias, ends)
        up = grouped_linear(x, self.up, self.up_bias, ends)
        return grouped_linear(self.combine(gate, up), self.down, self.down_bias, ends)

    def expert_plan(self) -> ExpertPlan:
        # Parts of an expert make inner features each, and `down` adds them up.
        return {"gate": 2, "up": 2, "down": 1, "gate_bias": 1, "up_bias": 1, "down_bias": None}

    def param_specs(self) -> dict[str, Spec]:
        specs = {name: Spec("expert", *widths, used=self.used) for name, widths in self.widths.items()}
        specs["down"] = replace(specs["down"], start="residual")
        if self.down_bias is not None:
            for name, (_, d_out) in self.widths.items():
                specs[f"{name}_bias"] = Spec("bias", 1, d_out, 0.0, used=self.used)
        return specs


class GLUExperts(Experts):
    """down(act(gate(x)) * up(x)) for each expert. Source: arXiv 2401.04088 (Mixtral)."""

    class Config(Experts.Config):
        type: Literal["glu"] = "glu"
        activation: Activation = "silu"
        """Applied to the gate."""

    def __init__(self, config: Config, dim: int, n_experts: int, top_k: int):
        super().__init__(config, dim, n_experts, top_k)
        self.activation = activation(config.activation)

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


class ClampedSwiGLUExperts(Experts):
    """down((clamp(up) + 1) * g * sigmoid(alpha * g)) with g = min(gate, limit). Source: arXiv 2508.10925 (gpt-oss)."""

    class Config(Experts.Config):
        type: Literal["clamped_swiglu"] = "clamped_swiglu"
        limit: PositiveFloat = 7.0
        """Largest gate, and largest magnitude of up."""
        alpha: PositiveFloat = 1.702
        """Slope of the sigmoid."""

    def __init__(self, config: Config, dim: int, n_experts: int, top_k: int):
        super().__init__(config, dim, n_experts, top_k)
        self.limit, self.alpha = config.limit, config.alpha

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """x (M, d_in) times weight[e] (d_in, d_out) for the rows of expert e, which end before row ends[e] (int32)."""
    y: Tensor = _grouped_mm(x, weight, ends)
    if bias is None:
        return y
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
    return y + bias[expert]


# torch's own operator cannot be traced in float32 (its shape function knows bfloat16 only), and its backward does not
# take gradients that are not laid out densely, such as an expanded one, nor no rows at all.
@torch.library.custom_op("titan_lite::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a (M, K), b (E, K, N) -> (M, N), rows of `a` in groups; or a (K, M), b (M, N) -> (E, K, N), their inner sums."""
    return F.grouped_mm(a, b, offs=ends) if a.numel() else a.new_zeros(_grouped_shape(a, b, ends))


@_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(_grouped_shape(a, b, ends))


def _grouped_shape(a: Tensor, b: Tensor, ends: Tensor) -> tuple[int, ...]:
    return (a.shape[0], b.shape[2]) if b.ndim == 3 else (len(ends), a.shape[0], b.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _grouped_mm(grad, b.transpose(1, 2), ends), _grouped_mm(a.t(), grad, ends), None


_grouped_mm.register_autograd(_backward, setup_context=_save)
