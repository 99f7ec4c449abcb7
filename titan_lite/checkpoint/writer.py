"""DCP's storage side of a save: every rank streams one safetensors file, the coordinator completes the folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from titan_lite.checkpoint.folder import (
    MANIFEST,
    free_bytes,
    fresh_name,
    mount_point,
    show_bytes,
    step_name,
    sync_folder,
)
from titan_lite.checkpoint.index import INDEX, Chunk, Index, StoredTensor, chunk_key, index_to_json, shard_file
from titan_lite.checkpoint.manifest import FileSum, Manifest, manifest_to_json
from titan_lite.checkpoint.safetensors_file import Entry, write_file, write_safetensors
from titan_lite.checkpoint.shard import Shard, nbytes

TRAIN_STATE = "train_state.json"
OVERHEAD = 64 * 2**10  # bytes allowed for the manifest and the blocks of small files
OVERHEAD_PER_CHUNK = 512  # bytes allowed for a chunk's entries in the header and the index


class ShardPlanner(DefaultSavePlanner):
    """Plans the save of `{name: Shard}`; what several ranks hold alike is written by one of them, evenly spread."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, shard) for name, shard in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return cast(Shard, self.state_dict[index.fqn]).local


def _write_item(name: str, shard: Shard) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(shard.offsets), shard.local.shape)
    data = TensorWriteData(chunk, TensorProperties(shard.local.dtype), torch.Size(shard.shape))
    return WriteItem(MetadataIndex(name, shard.offsets), WriteItemType.SHARD, tensor_data=data)


class StepWriter(StorageWriter):
    """Writes one step folder. Used for one save and then thrown away.

    `describe(index, files)` makes the manifest (coordinator only). The folder has a temporary name until it is durable.
    """

    def __init__(
        self, folder: Path, step: int, train_state: bytes, describe: Callable[[Index, Mapping[str, FileSum]], Manifest]
    ) -> None:
        self.folder = folder
        self.step = step
        self.train_state = train_state
        self.describe = describe
        self.temporary: Path | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to reset: one writer, one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the coordinator makes the folder once the plan is known to fit on the disk."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Refuses a step that exists and a disk too small; makes the temporary folder and tells every rank its file."""
        final = self.folder / step_name(self.step)
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, "a checkpoint is never overwritten", str(final))
        items = [item for plan in plans for item in plan.items]
        need = sum(_item_bytes(item) + OVERHEAD_PER_CHUNK for item in items) + len(self.train_state) + OVERHEAD
        if need > free_bytes(self.folder):
            raise OSError(errno.ENOSPC, self._no_space(need), str(final))
        self.temporary = self.folder / fresh_name(self.step, "tmp")
        self.temporary.mkdir()
        return [
            dataclasses.replace(plan, storage_data=str(self.temporary / shard_file(rank)))
            for rank, plan in enumerate(plans)
        ]

    def _no_space(self, need: int) -> str:
        return (
            f"no space left on {mount_point(self.folder)}: the checkpoint needs {show_bytes(need)}, "
            f"{show_bytes(free_bytes(self.folder))} are free"
        )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's shard file; a rank that has nothing to write makes none."""
        results: list[WriteResult] = []
        if plan.items:
            path = Path(plan.storage_data)
            keys = {item.index: _key(item) for item in plan.items}
            entries = [_entry(keys[item.index], item, planner) for item in plan.items]
            try:
                written = write_safetensors(path, entries, {"format": "pt", "step": str(self.step)})
            except OSError as error:
                reason = (
                    error.strerror if error.errno != errno.ENOSPC else self._no_space(sum(map(_item_bytes, plan.items)))
                )
                raise OSError(error.errno, reason, str(path)) from error
            results = [
                WriteResult(item.index, _item_bytes(item), (path.name, written.starts[keys[item.index]], written.sum))
                for item in plan.items
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """All shards are durable: writes index, train state and, last, the manifest; then the folder gets its name."""
        assert self.temporary is not None
        files: dict[str, FileSum] = {
            result.storage_data[0]: result.storage_data[2] for rank in results for result in rank
        }
        index = _index(metadata, results)
        files[INDEX] = write_file(self.temporary / INDEX, index_to_json(index))
        files[TRAIN_STATE] = write_file(self.temporary / TRAIN_STATE, self.train_state)
        write_file(self.temporary / MANIFEST, manifest_to_json(self.describe(index, files)))
        sync_folder(self.temporary)
        os.rename(self.temporary, self.folder / step_name(self.step))
        sync_folder(self.folder)

    def abandon(self) -> None:
        """Removes what a failed save has written (coordinator, once no rank writes any more)."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by DCP from a path."""
        return False


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _item_bytes(item: WriteItem) -> int:
    return nbytes(_data(item).properties.dtype, tuple(_data(item).chunk.sizes))


def _key(item: WriteItem) -> str:
    whole = _data(item).chunk.sizes == _data(item).size
    return chunk_key(item.index.fqn, tuple(_data(item).chunk.offsets), whole)


def _entry(key: str, item: WriteItem, planner: SavePlanner) -> Entry:
    data = _data(item)
    return Entry(
        key, data.properties.dtype, tuple(data.chunk.sizes), lambda: cast(torch.Tensor, planner.resolve_data(item))
    )


def _index(metadata: Metadata, results: list[list[WriteResult]]) -> Index:
    places = {result.index: result.storage_data for rank in results for result in rank}
    index: Index = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            file, start, _ = places[MetadataIndex(name, chunk.offsets)]
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, start))
        index[name] = StoredTensor(tensor.properties.dtype, tuple(tensor.size), tuple(chunks))
    return index
