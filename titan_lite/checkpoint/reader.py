"""DCP's storage side of a load: reads blocks of tensors by offset, in place where it can. Unpickles nothing."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from titan_lite.checkpoint.folder import refuse
from titan_lite.checkpoint.index import Index, to_dcp
from titan_lite.checkpoint.manifest import open_regular
from titan_lite.checkpoint.shard import as_bytes

BLOCK = 32 * 2**20  # bytes read at a time where values cannot be read straight into their tensor

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class StepReader(StorageReader):
    """Reads the tensors of one step folder, as its (already checked) index says where they are."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.metadata = to_dcp(index)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to reset: one reader, one folder."""

    def read_metadata(self, *args: Any) -> Metadata:  # no **kwargs: DCP would take us for a reader of per-rank metadata
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads file by file, in the order of the bytes."""
        storage = self.metadata.storage_data
        reads = [(*storage[item.storage_index], item) for item in plan.items]
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for dtype, chunk, item in sorted(reads, key=lambda read: (read[1].file, read[1].start)):
                if chunk.file not in files:
                    files[chunk.file] = stack.enter_context(open_regular(self.folder / chunk.file))
                target = planner.resolve_tensor(item).detach()
                region = list(zip(item.storage_offsets, item.lengths, strict=True))
                read_block(files[chunk.file], chunk.start, chunk.shape, dtype, region, target)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by DCP from a path."""
        return False


Region = list[tuple[int, int]]  # per dimension of a chunk: begin, length


def read_block(
    file: BinaryIO, start: int, shape: tuple[int, ...], dtype: torch.dtype, region: Region, target: Tensor
) -> None:
    """Copies the `region` of the row-major block of `shape` at byte `start` into `target` (of the region's shape).

    Whole rows for a contiguous CPU tensor of the same dtype are read in place; else through at most BLOCK bytes.
    """
    if target.numel() == 0:
        return
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    (begin, rows), inner = (region[0], region[1:]) if region else ((0, 1), [])
    whole_rows = all(n == size for (_, n), size in zip(inner, shape[1:], strict=True))
    in_place = target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
    if whole_rows and in_place:
        _read_bytes(file, start + begin * row_bytes, as_bytes(target))
    elif row_bytes > BLOCK:
        for row in range(rows):
            read_block(file, start + (begin + row) * row_bytes, shape[1:], dtype, inner, target[row])
    else:
        target = target if region else target.reshape(1)
        step = BLOCK // row_bytes
        for row in range(0, rows, step):
            n = min(step, rows - row)
            block = torch.empty((n, *shape[1:]), dtype=dtype)
            _read_bytes(file, start + (begin + row) * row_bytes, as_bytes(block))
            for dim, (at, length) in enumerate(inner, start=1):
                block = block.narrow(dim, at, length)
            target[row : row + n].copy_(block)


def _read_bytes(file: BinaryIO, start: int, into: memoryview) -> None:
    while into:
        n = os.preadv(file.fileno(), [into], start)
        if n == 0:
            raise OSError(0, "the file ended early")
        start, into = start + n, into[n:]


def read_tensors(folder: Path, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place from a step folder, whatever the layout. Without collectives. Raises ConfigError.

    The caller has made sure that names and shapes agree (compare.py); another dtype is converted.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(dict(tensors), storage_reader=StepReader(folder, index), planner=planner, no_dist=True)
    except CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        if not isinstance(cause, OSError):
            raise cause from None
        raise refuse(folder / "shard", f"the tensors cannot be read: {cause.strerror}") from None
