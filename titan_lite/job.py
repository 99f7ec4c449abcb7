"""A whole run as one object: one field per section of the TOML file."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import PrivateAttr

import titan_lite.data.tokenizers  # noqa: F401  (makes its types known)
from titan_lite.checkpoint.config import Checkpoint
from titan_lite.config.component import ConfigBase
from titan_lite.config.errors import NOT_AVAILABLE, Problem
from titan_lite.config.paths import Origin, Origins, nearest_origin, parse_key
from titan_lite.data.config import DataConfig
from titan_lite.data.tokenizer import Bytes, Tokenizer
from titan_lite.models.transformer import Transformer
from titan_lite.objectives import LanguageModeling, Objective
from titan_lite.optim.adamw import AdamW
from titan_lite.optim.optimizer import Optimizer
from titan_lite.optim.schedule import LRScheduler
from titan_lite.parallel.config import ActivationCheckpoint, Compile, Parallelism
from titan_lite.parallel.quantize import Quantize
from titan_lite.run.config import (
    Comm,
    Debug,
    Generation,
    JobInfo,
    Metrics,
    Profiling,
    Training,
    Validation,
)
from titan_lite.run.torchtitan import Experimental, FaultTolerance, MemoryEstimation


class Job(ConfigBase):
    """Everything a TOML file can say. Made by `config.load.load_job`, which also knows where each key was set."""

    job: JobInfo = JobInfo()
    """Where the run writes and what it is called."""
    model: Transformer.Config = Transformer.Config()
    """The model."""
    tokenizer: Tokenizer.Config = Bytes.Config()
    """Text to token ids."""
    data: DataConfig = DataConfig()
    """Where the text comes from."""
    objective: Objective.Config = LanguageModeling.Config()
    """What is minimised."""
    training: Training = Training()
    """How long, on what, in which precision."""
    optimizer: Optimizer.Config = AdamW.Config()
    """Update rule."""
    lr_scheduler: LRScheduler.Config = LRScheduler.Config()
    """Learning rate over the run."""
    parallelism: Parallelism = Parallelism()
    """Layout over ranks."""
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    """What backward recomputes."""
    compile: Compile = Compile()
    """torch.compile."""
    quantize: Quantize = Quantize()
    """Settings of model.converters."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving and resuming."""
    metrics: Metrics = Metrics()
    """Logging."""
    validation: Validation = Validation()
    """Loss on text that training never sees."""
    generation: Generation = Generation()
    """Samples at the end of training."""
    profiling: Profiling = Profiling()
    """Profiler traces."""
    debug: Debug = Debug()
    """Seed and determinism."""
    comm: Comm = Comm()
    """Process groups."""
    memory_estimation: MemoryEstimation = MemoryEstimation()
    """torchtitan's section, not honoured."""
    fault_tolerance: FaultTolerance = FaultTolerance()
    """torchtitan's section, not honoured."""
    experimental: Experimental = Experimental()
    """torchtitan's section, not honoured."""

    _origins: Origins = PrivateAttr(default_factory=dict)
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line each: old spellings, settings this project cannot honour. Printed once, by the first rank."""
        return self._warnings

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if self.optimizer.early_step_in_backward:
            key = "optimizer.early_step_in_backward"
            yield Problem(NOT_AVAILABLE, key, "is not available yet", True, "false")

    def remember(self, origins: Origins, warnings: Iterable[str]) -> None:
        """For `load_job`: where the keys were set, and what there is to warn of."""
        self._origins = origins
        self._warnings = tuple(warnings)

    def origin(self, key: str) -> Origin | None:
        """(file, line) where a full key was set, or else the table around it; None where everything is a default."""
        return nearest_origin(self._origins, parse_key(key))

    def __eq__(self, other: object) -> bool:
        """Equal settings; where they were written does not count."""
        return isinstance(other, Job) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]
