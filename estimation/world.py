"""A world of any number of ranks in this one process, where tensors have shapes and no content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_lite.parallel.mesh import make_expert_mesh, make_mesh
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World

if TYPE_CHECKING:
    from titan_lite.job import Job


@dataclass(frozen=True)
class FakeWorld(World):
    """One rank; the first one of a pipeline's has the largest share of what ranks do not share evenly. Its collectives
    go nowhere.

    Meshes and shards are made of real objects; from `materialize` on, all tensors are fake ones. FSDP over a mesh of
    several axes does not work the other way round.
    """

    inside: ExitStack = field(default_factory=ExitStack)
    """Holds the mode, once it is entered."""

    def materialize(self, model: nn.Module, device: torch.device) -> None:
        self.inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        super().materialize(model, device)

    def read(self, numbers: Tensor, likely: Sequence[int]) -> list[int]:
        return list(likely)

    def total(self, *values: float) -> list[float]:
        return [value * self.dp_size for value in values]


@contextmanager
def fake_world(job: Job, precision: Precision, size: int, rank: int = 0) -> Iterator[FakeWorld]:
    """The world a run of `job` on `size` ranks would make. There must be no process group, and is none afterwards."""
    device = torch.device("cpu")  # fake tensors of a device that torch was not built for end the process in backward
    sharded = size > 1 or precision.mixed or job.training.enable_cpu_offload
    with ExitStack() as inside:
        if not sharded:
            yield FakeWorld(0, 1, device, inside=inside)
            return
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            mesh = make_mesh(job.parallelism, size, device.type)
            second = make_mesh(job.parallelism, size, device.type, True) if len(precision.masters) > 1 else None
            own_groups = (False, True) if second else (False,)
            of_experts = filter(None, (make_expert_mesh(job.parallelism, size, device.type, o) for o in own_groups))
            yield FakeWorld(
                rank, size, device, mesh, second_mesh=second, expert_meshes=tuple(of_experts), inside=inside
            )
        finally:
            inside.close()
            dist.destroy_process_group()
