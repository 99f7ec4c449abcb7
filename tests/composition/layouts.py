"""The layouts that every model feature meets: a name, the number of ranks, and the [parallelism] table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """One way to lay a job out over ranks."""

    name: str
    kind: str
    """Every feature of a model meets every kind, in one layout of it or another."""
    ranks: int
    parallelism: Mapping[str, Any]


LAYOUTS = (
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
"""Another kind of parallelism is more lines of this table. Ranks: 1, 2 or 4, for which there are worker pools."""
BY_NAME = {layout.name: layout for layout in LAYOUTS}
