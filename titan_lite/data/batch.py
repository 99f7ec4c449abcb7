"""What the data side hands to a training or validation step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

IGNORE = -100
"""Target that no loss is computed for (torch.nn.functional.cross_entropy's default)."""


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one step."""

    tokens: torch.Tensor
    """(R, T) int64 inputs."""
    targets: torch.Tensor
    """(R, T) int64, the token after each input, or IGNORE."""
    documents: torch.Tensor
    """(R, T) int32: 0 for the document that the lane's row before ended in, 1 for the next one, ... For validation,
    whose rows are no lanes: 0 for the one that a row begins in."""
    cursors: list[dict[str, int]]
    """One JSON-able cursor per row: where the row goes on after this batch (none for validation)."""
    dropped: int = 0
    """Documents without text (or undecodable) that this rank's readers have left out since they started."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            targets=self.targets.pin_memory(),
            documents=self.documents.pin_memory(),
        )
