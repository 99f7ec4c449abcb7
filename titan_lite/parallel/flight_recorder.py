"""NCCL's flight recorder: the last collectives of every rank, written to files when one times out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_lite.run.config import Comm


def set_up_flight_recorder(comm: Comm, dump_folder: Path) -> None:
    """Sets what NCCL reads from the environment when its process group is made; only CUDA runs have one."""
    if comm.trace_buf_size == 0:
        return
    folder = dump_folder / comm.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(comm.trace_buf_size)
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
    os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(folder / comm.save_traces_file_prefix)
