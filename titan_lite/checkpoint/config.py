"""[checkpoint]: what is saved, when, and what a run starts from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, NOT_HERE, Problem
from titan_lite.config.fields import Count, InnerFolder, PositiveInt, Strings

if TYPE_CHECKING:
    from titan_lite.job import Job


def _not_one(value: int) -> int:
    if value == 1:
        raise ValueError("must be 0 (keep all) or at least 2: the newest one may be incomplete while it is written")
    return value


class Checkpoint(ConfigBase):
    """[checkpoint]: keys of torchtitan. Folders are job.dump_folder/folder/step-N."""

    enable: bool = False
    """Save, and resume from the newest checkpoint of the dump folder."""
    enable_ft_dataloader_checkpoints: bool = True
    """Idle: belongs to [fault_tolerance]."""
    folder: InnerFolder = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""
    interval: PositiveInt = 500
    """Steps between saves (the last step is always saved)."""
    initial_load_path: str = ""
    """Checkpoint to start from where the run has none of its own: a step-N, checkpoint or dump folder."""
    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path."""
    initial_load_in_hf: bool = False
    """initial_load_path is a Hugging Face folder (config.json and safetensors) of this very model; its weights are
    taken over, its tokenizer is not looked at."""
    initial_load_in_hf_quantized: bool = False
    """That folder has to hold weights in float8 with factors of blocks (DeepSeek-V3's), which are recognised anyway."""
    last_save_model_only: bool = False
    """Save only the weights at the last step (such a run cannot be trained further)."""
    last_save_in_hf: bool = False
    """Beside the checkpoint of the last step, make job.dump_folder/hf-step-N of it, verified, as
    scripts/convert_to_hf.py does: once training is over, by the first rank alone."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Type of the weights in a save with last_save_model_only, and in the folder of last_save_in_hf, where they stay
    what they are by default."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write in the background, after copying to host memory (page-locked with async_with_pinned_mem)."""
    keep_latest_k: Annotated[Count, AfterValidator(_not_one)] = 10
    """Newest checkpoints kept; 0 = all."""
    load_step: Annotated[int, Field(ge=-1)] = -1
    """Step to resume from; -1 = the newest complete one."""
    exclude_from_loading: Strings = ()
    """Parts of a checkpoint not to load: "optimizer", "dataloader", "train_state", or the beginning of tensor names."""
    enable_first_step_checkpoint: bool = False
    """Also save after step 1."""
    create_seed_checkpoint: bool = False
    """Not honoured: initial weights do not depend on the layout."""
    load_only: bool = False
    """Load, but never save."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if not self.enable:
            return
        yield from self._hf_problems()
        if self.initial_load_path and not Path(os.path.expanduser(self.initial_load_path)).exists():
            yield Problem(FILE_MISSING, ".initial_load_path", "does not exist", self.initial_load_path)

    def _hf_problems(self) -> Iterable[Problem]:
        for key in ("initial_load_in_hf", "last_save_in_hf"):
            if getattr(self, key) and importlib.util.find_spec("transformers") is None:
                why = "needs the package transformers"
                yield Problem(NOT_HERE, f".{key}", why, True, "false, or titan_lite with its extra `hf`")
        if not self.initial_load_in_hf:
            if self.initial_load_in_hf_quantized:
                why = "is set, but checkpoint.initial_load_in_hf is not"
                yield Problem(CROSS_FIELD, ".initial_load_in_hf_quantized", why, True, "false")
            return
        if not self.initial_load_path:
            why = "is set, but checkpoint.initial_load_path names no folder"
            yield Problem(CROSS_FIELD, ".initial_load_in_hf", why, True, "false, or an initial_load_path")
        if not self.initial_load_model_only:
            why = "does not go with checkpoint.initial_load_in_hf: such a folder holds only weights"
            yield Problem(CROSS_FIELD, ".initial_load_model_only", why, False, "true")

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.last_save_in_hf and (not self.enable or self.load_only):
            yield "checkpoint.last_save_in_hf has no effect: nothing is saved"
        if not self.enable:
            idle: tuple[tuple[str, object], ...] = (
                ("initial_load_path", ""),
                ("initial_load_in_hf", False),
                ("load_step", -1),
                ("load_only", False),
            )
            for key, default in idle:
                if getattr(self, key) != default:
                    yield f"checkpoint.{key} has no effect: checkpoint.enable is false"
        if self.export_dtype != "float32" and not (self.last_save_model_only or self.last_save_in_hf):
            yield "checkpoint.export_dtype has no effect: checkpoint.last_save_model_only and last_save_in_hf are false"
        if self.create_seed_checkpoint:
            yield "checkpoint.create_seed_checkpoint is not honoured: every layout starts from the same weights"
