"""The layouts that every model feature meets: a name, the number of ranks, and the [parallelism] table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from titan_lite.parallel.config import Parallelism


class Layout(NamedTuple):
    """One way to lay a job out over ranks."""

    name: str
    kind: str
    """Every feature of a model meets every kind, in one layout of it or another."""
    ranks: int
    parallelism: Mapping[str, Any]

    @property
    def groups(self) -> int:
        """Groups of ranks that see different rows."""
        degree = Parallelism(**self.parallelism).data_parallel_degree(self.ranks)
        assert degree is not None
        return degree

    @property
    def spreads_experts(self) -> bool:
        """Whether a model needs experts for it."""
        return Parallelism(**self.parallelism).spreads_experts

    @property
    def rows_of_a_stage(self) -> int:
        """Rows of a pipeline's micro-batch; 0 without a pipeline."""
        parallelism = Parallelism(**self.parallelism)
        return parallelism.pipeline_parallel_microbatch_size * (parallelism.pipeline_parallel_degree > 1)


DENSE = (
    Layout("one process", "one process", 1, {}),
    Layout("fsdp 2", "fsdp", 2, {}),
    Layout("fsdp 2, always reshard", "fsdp", 2, {"fsdp_reshard_after_forward": "always"}),
    Layout("fsdp 4, never reshard", "fsdp", 4, {"fsdp_reshard_after_forward": "never"}),
    Layout("ddp 2", "replicas", 2, {"data_parallel_replicate_degree": 2}),
    Layout("hsdp 2 x 2", "replicas", 4, {"data_parallel_replicate_degree": 2}),
    Layout("tp 2", "tp", 2, {"tensor_parallel_degree": 2}),
    Layout("tp 2, whole logits", "tp", 2, {"tensor_parallel_degree": 2, "disable_loss_parallel": True}),
    Layout("tp 4", "tp", 4, {"tensor_parallel_degree": 4}),
    Layout("fsdp 2 x tp 2", "dp x tp", 4, {"tensor_parallel_degree": 2}),
    Layout("ddp 2 x tp 2", "dp x tp", 4, {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2}),
)
"""Data and tensor parallelism."""


def _ring(**more: Any) -> dict[str, Any]:
    return {"context_parallel_degree": 2} | more


def _ulysses(**more: Any) -> dict[str, Any]:
    return {"context_parallel_degree": 2, "context_parallel_method": "ulysses"} | more


def _stages(schedule: str, **more: Any) -> dict[str, Any]:
    return {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule} | more


def _experts(degree: int, **more: Any) -> dict[str, Any]:
    return {"expert_parallel_degree": degree} | more


PASSED: dict[str, Any] = {"context_parallel_rotate_method": "alltoall"}
UNDEALT: dict[str, Any] = {"context_parallel_load_balancer": "none"}
REPLICAS: dict[str, Any] = {"data_parallel_replicate_degree": 2}
TP: dict[str, Any] = {"tensor_parallel_degree": 2}
ETP: dict[str, Any] = TP | {"expert_tensor_parallel_degree": 2}
SPREAD = (
    Layout("ring 2, gathered", "ring", 2, _ring()),
    Layout("ring 2, passed on", "ring", 2, _ring(**PASSED)),
    Layout("ring 4, passed on, undealt", "ring", 4, _ring(**PASSED, **UNDEALT) | {"context_parallel_degree": 4}),
    Layout("fsdp 2 x ring 2", "ring", 4, _ring(**PASSED)),
    Layout("tp 2 x ring 2", "ring", 4, _ring(**TP)),
    Layout("ulysses 2", "ulysses", 2, _ulysses()),
    Layout("ulysses 4", "ulysses", 4, _ulysses(context_parallel_degree=4)),
    Layout("ddp 2 x ulysses 2", "ulysses", 4, _ulysses(**REPLICAS)),
    Layout("tp 2 x ulysses 2", "ulysses", 4, _ulysses(**TP)),
    Layout("1F1B 2", "pp", 2, _stages("1F1B")),
    Layout("GPipe 2", "pp", 2, _stages("GPipe")),
    Layout("Interleaved1F1B 2", "pp", 2, _stages("Interleaved1F1B")),
    Layout("InterleavedZeroBubble 2", "pp", 2, _stages("InterleavedZeroBubble")),
    Layout("LoopedBFS 2", "pp", 2, _stages("LoopedBFS")),
    Layout("ZBVZeroBubble 2", "pp", 2, _stages("ZBVZeroBubble")),
    Layout("DualPipeV 2", "pp", 2, _stages("DualPipeV")),
    Layout("1F1B 4", "pp", 4, _stages("1F1B", pipeline_parallel_degree=4)),
    Layout("1F1B 2 x fsdp 2", "pp x others", 4, _stages("1F1B", pipeline_parallel_microbatch_size=2)),
    Layout("ZBVZeroBubble 2 x fsdp 2", "pp x others", 4, _stages("ZBVZeroBubble")),
    Layout("Interleaved1F1B 2 x ddp 2", "pp x others", 4, _stages("Interleaved1F1B", **REPLICAS)),
    Layout("InterleavedZeroBubble 2 x tp 2", "pp x others", 4, _stages("InterleavedZeroBubble", **TP)),
    Layout("1F1B 2 x ring 2", "pp x others", 4, _stages("1F1B", **_ring(**PASSED))),
    Layout("DualPipeV 2 x ulysses 2", "pp x others", 4, _stages("DualPipeV", **_ulysses())),
    Layout("GPipe 2 x ep 2", "pp x others", 4, _stages("GPipe", **_experts(2))),
    Layout("DualPipeV 2 x ep 2", "pp x others", 4, _stages("DualPipeV", **_experts(2))),
    Layout("ep 2", "ep", 2, _experts(2)),
    Layout("ep 4", "ep", 4, _experts(4)),
    Layout("fsdp 4, ep 2", "ep", 4, _experts(2)),
    Layout("ddp 2 x fsdp 2, ep 2", "ep", 4, _experts(2, **REPLICAS)),
    Layout("fsdp 2 x tp 2, ep 4", "ep x others", 4, _experts(4, **TP)),
    Layout("fsdp 2 x tp 2, ep 2, etp 2", "ep x others", 4, _experts(2, **ETP)),
    Layout("tp 2, etp 2", "ep x others", 2, _experts(1, **ETP)),
    Layout("ring 2, ep 2", "ep x others", 2, _experts(2, **_ring())),
    Layout("fsdp 2 x ulysses 2, ep 4", "ep x others", 4, _experts(4, **_ulysses())),
    Layout("ddp 2 x ring 2, ep 2", "ep x others", 4, _experts(2, **REPLICAS, **_ring(**PASSED))),
)
"""Rows, layers and experts over ranks. Another kind of parallelism is more lines of this table, or a table beside it.
Ranks: 1, 2 or 4, for which there are worker pools."""
LAYOUTS = DENSE + SPREAD
BY_NAME = {layout.name: layout for layout in LAYOUTS}
