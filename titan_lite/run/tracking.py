"""TensorBoard and Weights & Biases: the same scalars, under torchtitan's names. Both libraries are imported on use."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_lite.config.errors import ConfigError
from titan_lite.run.device import Memory
from titan_lite.run.hooks import RunFacts
from titan_lite.run.sink import LoggedStep, LoggedValidation, Sink, Totals


def step_scalars(row: LoggedStep) -> dict[str, float]:
    """A logged step as named scalars; what is unknown on this device has none."""
    scalars = {
        "loss_metrics/global_avg_loss": row.loss,
        "grad_norm": row.grad_norm,
        "lr": row.lr,
        "n_tokens_seen": row.tokens_seen,
        "throughput(tps)": row.tokens_per_second,
        "tflops": row.tflops,
        "time_metrics/end_to_end(s)": row.step_seconds,
        "time_metrics/data_loading(s)": row.data_seconds,
        "time_metrics/data_loading(%)": 100 * row.data_seconds / row.step_seconds,
    }
    if row.mfu is not None:
        scalars["mfu(%)"] = 100 * row.mfu
    return scalars | _memory_scalars(row.memory) | row.extra


def validation_scalars(row: LoggedValidation) -> dict[str, float]:
    """A validation pass as named scalars."""
    scalars = {
        "loss": row.loss,
        "bits_per_byte": row.bits_per_byte,
        "throughput(tps)": row.tokens_per_second,
        **_memory_scalars(row.memory),
        **row.extra,
    }
    return {f"validation_metrics/{name}": value for name, value in scalars.items()}


def _memory_scalars(memory: Memory) -> dict[str, float]:
    scalars = {
        "memory/max_reserved(GiB)": memory.reserved_gib,
        "memory/max_reserved(%)": memory.percent(memory.reserved_gib),
    }
    if memory.active_gib is not None:
        scalars["memory/max_active(GiB)"] = memory.active_gib
        scalars["memory/max_active(%)"] = memory.percent(memory.active_gib)
    if memory.alloc_retries is not None:
        scalars["memory/num_alloc_retries"] = memory.alloc_retries
    if memory.ooms is not None:
        scalars["memory/num_ooms"] = memory.ooms
    return scalars


class TensorBoard(Sink):
    """Event files in `folder`. A resumed run hides, in the same curve, the points after the step it resumes from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=facts.start_step + 1)

    def step(self, row: LoggedStep) -> None:
        self._add(step_scalars(row), row.step)

    def validation(self, row: LoggedValidation) -> None:
        self._add(validation_scalars(row), row.step)

    def end(self, totals: Totals) -> None:
        self._writer.close()

    def _add(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WeightsAndBiases(Sink):
    """A run in Weights & Biases (its own settings say which project), continued under the same id after a resume."""

    def __init__(self, folder: Path, config: Mapping[str, Any], suffix: str = "") -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError.at(
                "metrics.enable_wandb",
                "Weights & Biases is not installed: pip install 'titan_lite[wandb]'",
                value=True,
                allowed="false without the extra `wandb`",
            )
        self.folder = folder
        self.config = dict(config)
        self.suffix = suffix

    def start(self, facts: RunFacts) -> None:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        name = facts.run_id + self.suffix if facts.run_id else None
        self._run = wandb.init(dir=str(self.folder), config=self.config, id=name, resume="allow")

    def step(self, row: LoggedStep) -> None:
        self._run.log(step_scalars(row), step=row.step)

    def validation(self, row: LoggedValidation) -> None:
        self._run.log(validation_scalars(row), step=row.step)

    def end(self, totals: Totals) -> None:
        self._run.finish(exit_code=1 if totals.reason.startswith("failed") else 0)
