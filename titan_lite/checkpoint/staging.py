"""Snapshots of tensors in host memory, from which a background save writes while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from titan_lite.checkpoint.shard import Shard


class Snapshot:
    """Copies shards to host memory; when a call returns, the tensors may change.

    With `keep`, the host buffers are kept from save to save, and page-locked where the tensors are on an accelerator
    (copies then run at the bus's full speed); without, they are allocated anew and freed after the save.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        copies = {name: replace(shard, local=self._copy(name, shard.local)) for name, shard in shards.items()}
        if self.keep and any(shard.local.device.type != "cpu" for shard in shards.values()):
            torch.accelerator.synchronize()  # the copies into page-locked memory only were queued
        return copies

    def _copy(self, name: str, source: Tensor) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            pin = self.keep and source.device.type != "cpu"
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=pin)
            if self.keep:
                self.buffers[name] = buffer
        return buffer.copy_(source, non_blocking=self.keep)
