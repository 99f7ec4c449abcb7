"""Context parallelism: ranks share each row's tokens, and attention alone sees those of the others."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from titan_lite.models.attention import HeadAttention
from titan_lite.models.attention.kernel import Kernel, Scoring
from titan_lite.models.transformer import Transformer
from titan_lite.parallel.config import Parallelism
from titan_lite.parallel.ring import ROTATIONS, Ring
from titan_lite.parallel.row import SplitRow
from titan_lite.parallel.ulysses import Ulysses


def apply_context_parallel(model: Transformer, mesh: DeviceMesh, config: Parallelism) -> None:
    """Lets a model on the meta device, whose heads are those of this rank, read its tokens of each row of `mesh`."""
    model.row = row = SplitRow(mesh, config.context_parallel_load_balancer)
    for module in model.modules():
        if isinstance(module, HeadAttention):
            module.kernel = _spread(module.kernel, module.scoring, row, config)
    model.find_shared()


def _spread(kernel: Kernel, scoring: Scoring, row: SplitRow, config: Parallelism) -> Kernel:
    if config.context_parallel_method == "ulysses":
        return Ulysses(kernel, scoring, row)
    return Ring(kernel, scoring, row, ROTATIONS[config.context_parallel_rotate_method](row))
