"""The life of a run: join the others, build, resume, then step, validate, save and tell until done or stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_lite.checkpoint.manager import CheckpointManager, Start
from titan_lite.checkpoint.restore import read_train_state
from titan_lite.checkpoint.state import (
    materialize_optimizer_state,
    memory_tensors,
    model_tensors,
    optimizer_tensors,
)
from titan_lite.checkpoint.world import agreed
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import to_toml
from titan_lite.data.batch import IGNORE, Batch
from titan_lite.data.loader import TrainBatches, train_batches, validation_batches
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.job import Job
from titan_lite.models.module import warn_of_doubts
from titan_lite.models.transformer import vocab_size_for
from titan_lite.parallel.flight_recorder import set_up_flight_recorder
from titan_lite.parallel.pipeline.limits import refuse_part_of_a_run
from titan_lite.parallel.pipeline.plan import micro_batch_rows
from titan_lite.parallel.precision import Precision
from titan_lite.parallel.world import World, pick_device
from titan_lite.run.calibrate import calibrate
from titan_lite.run.determinism import seed_everything, set_deterministic
from titan_lite.run.facts import run_facts
from titan_lite.run.files import write_whole
from titan_lite.run.hooks import StepResult
from titan_lite.run.identity import checkpoint_facts, refuse_another_run
from titan_lite.run.lock import RunLock
from titan_lite.run.logging import logger, setup_logging
from titan_lite.run.observe import build_hooks
from titan_lite.run.sample import log_samples
from titan_lite.run.signals import EXIT_STOPPED, StopFlag
from titan_lite.run.validate import validate
from titan_lite.step import MicroBatch, StepTensors, build, metrics, step


@dataclass
class Progress:
    """How far the run is."""

    step: int
    """Optimizer steps done."""
    tokens_seen: int
    """Tokens of text trained on, over all ranks: see `Objective.n_read`."""
    global_batch_size: int
    """Rows per step; they are lanes of the data, so the number stays for the run's life."""
    seed: int
    """Draws the order of the data."""
    cursors: list[Any] | None
    """Where each row of the global batch goes on reading; None at the very start."""


class Trainer:
    """One worker's part of a run. `run` returns the exit code."""

    def __init__(self, job: Job, stop: StopFlag):
        self.job, self.stop = job, stop
        self.folder = Path(job.job.dump_folder)
        self.first_step_done = False

    def run(self) -> int:
        """Trains to `training.steps`, or until a signal asks to stop: 0, or 75 with everything saved."""
        job = self.job
        if job.debug.deterministic:
            set_deterministic(job.debug.deterministic_warn_only)
        seed_everything(job.debug.seed)
        device = pick_device()
        self.precision = Precision.of(job, device)
        if device.type == "cuda":
            set_up_flight_recorder(job.comm, self.folder)
        sharded = self.precision.mixed or job.training.enable_cpu_offload
        second_mesh = len(self.precision.masters) > 1
        self.world = World.connect(job.parallelism, device, sharded, job.comm.init_timeout_seconds, second_mesh)
        setup_logging(self.world.rank, color=not job.metrics.disable_color_printing)
        with ExitStack() as stack:
            with agreed(self.world):
                if self.world.rank == 0:
                    stack.enter_context(RunLock(self.folder))
            self._prepare()
            code = 0
            if self.progress.step >= job.training.steps:
                logger.info(f"Nothing to do: {self.folder} is at step {self.progress.step} of {job.training.steps}")
            else:
                code = self._train()
        # Only where all went well: after an error, taking the group down could wait for ranks that are in a collective.
        self.world.close()
        if self._is_to_be_exported(code):
            self._export()
        return code

    def _is_to_be_exported(self, code: int) -> bool:
        config = self.job.checkpoint
        writes = config.enable and config.last_save_in_hf and not config.load_only
        return writes and self.world.rank == 0 and code == 0 and not self._exported().exists()

    def _exported(self) -> Path:
        return self.folder / f"hf-step-{self.progress.step}"

    def _export(self) -> None:
        """The last step as a Hugging Face folder. The other ranks are gone by then: it may take its time."""
        from titan_lite.hf.export import export

        asked = self.job.checkpoint.export_dtype
        dtype = "" if asked == "float32" else asked
        report = export(self.checkpoints.folder / f"step-{self.progress.step}", self._exported(), dtype)
        logger.info("Made %s: %s, verified", self._exported(), report["class"])

    def _prepare(self) -> None:
        """Everything up to the first step: tokenizer, model, checkpoint, data."""
        job, world = self.job, self.world
        with agreed(world):
            self.tokenizer: Tokenizer = job.tokenizer.build()
            vocab_size = vocab_size_for(job.model, self.tokenizer.vocab_size)
        facts = checkpoint_facts(job, world, self.tokenizer)
        self.checkpoints = CheckpointManager(job.checkpoint, self.folder, world, facts)
        start = self.checkpoints.start()
        if start is None:
            refuse_another_run(job, self.folder)
        filled = start is not None and not job.checkpoint.exclude_from_loading
        self.training = build(job, world, self.precision, vocab_size, blank=filled)
        self.progress = Progress(0, 0, self._first_global_batch_size(), job.debug.seed, None)
        self.resumed_from = None if start is None else self._resume(start)
        self.accumulation = self._accumulation()
        if start is None:
            calibrate(self.training, self._batches, self._micro_batches)

    def _first_global_batch_size(self) -> int:
        training = self.job.training
        given = training.global_batch_size
        return training.local_batch_size * self.world.dp_size if given == -1 else given

    def _accumulation(self) -> int:
        """Micro-batches per step: the global batch is the run's, whatever the rank count; the last may be smaller."""
        local, share = self.job.training.local_batch_size, len(self._rows(self.progress.global_batch_size))
        refuse_part_of_a_run(self.job, share)
        if share % local:
            logger.warning("training.local_batch_size = %d does not divide the %d rows of each rank", local, share)
        return -(-share // local)

    def _rows(self, global_batch_size: int) -> range:
        """This rank's share of the rows of each global batch, which are lanes of the data."""
        size, ranks, rank = global_batch_size, self.world.dp_size, self.world.dp_rank
        if size % ranks:
            legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            why = f"the run's global batch of {size} rows cannot be shared evenly by {ranks} data-parallel ranks"
            raise ConfigError.at("training.global_batch_size", why, size, f"{legal} ranks", code=CROSS_FIELD)
        share = size // ranks
        return range(rank * share, (rank + 1) * share)

    # ---- checkpoints

    def _tensors(self, remembered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        model, optimizer = self.training.model, self.training.optimizer
        if remembered is None:
            remembered = self.training.memory.state(self._rows(self.progress.global_batch_size))
        memory = memory_tensors(self.training.memory, remembered, self.world.mesh)
        return model_tensors(model) | optimizer_tensors(model, optimizer) | memory

    def _resume(self, start: Start) -> str:
        """Goes on where the newest checkpoint stopped, or starts from another run's weights; returns where from."""
        finished = self.checkpoints.finished(start, self.job.training.steps)
        if finished is not None:
            self.progress.step = finished
            return str(start.folder)
        if start.model_only:
            self.checkpoints.load(start, model_tensors(self.training.model))
            warn_of_doubts(self.training.model, start.folder)
            return str(start.folder)
        with agreed(self.world):
            saved = read_train_state(start.folder)
            self._check_lanes(saved)
            goes_on = not self._data_begin_anew()
            rows = self._rows(saved["global_batch_size"] if goes_on else self.progress.global_batch_size)
        materialize_optimizer_state(self.training.optimizer)
        remembered = self.training.memory.state(rows)
        state = self.checkpoints.load(start, self._tensors(remembered))
        warn_of_doubts(self.training.model, start.folder)
        self.training.memory.restore(remembered, rows)
        if "cursors" not in state:  # left out: the data start again, in lanes and an order of this config
            state |= {"global_batch_size": self.progress.global_batch_size, "seed": self.progress.seed}
        if "optimizer" in self.job.checkpoint.exclude_from_loading:
            self.training.optimizer.state.clear()
        self.progress = Progress(**(vars(self.progress) | state))
        return str(start.folder)

    def _check_lanes(self, state: dict[str, Any]) -> None:
        """The rows of the global batch are lanes of the data, drawn by the seed: both stay as the run began."""
        job = self.job
        if self._data_begin_anew():
            return
        given, saved = job.training.global_batch_size, state.get("global_batch_size")
        if given not in (-1, saved):
            why = f"the checkpoint has {saved} rows per step, each a lane of the data that goes on from step to step"
            raise ConfigError.at("training.global_batch_size", why, given, f"{saved} or -1", code=CROSS_FIELD)
        if job.debug.seed != state.get("seed"):
            why = "the checkpoint's data are in the order of another seed"
            raise ConfigError.at("debug.seed", why, job.debug.seed, str(state.get("seed")), code=CROSS_FIELD)

    def _data_begin_anew(self) -> bool:
        return bool({"dataloader", "train_state"} & set(self.job.checkpoint.exclude_from_loading))

    def _train_state(self) -> dict[str, Any]:
        """The progress as JSON, with the cursors of all lanes in order."""
        cursors = [cursor for group in self.world.gather_dp(self.cursors) for cursor in group]
        return vars(self.progress) | {"cursors": cursors}

    def _save(self, last: bool = False) -> None:
        start = time.perf_counter()
        step = self.progress.step
        saved = self.checkpoints.save(step, self._tensors(), self._train_state(), last=last)
        if not saved:
            return
        self.hooks.on_checkpoint(step, self.checkpoints.folder / f"step-{step}", time.perf_counter() - start)

    # ---- the loop

    def _batches(self) -> TrainBatches:
        """This rank's rows of each global batch from here on: a contiguous share of the lanes."""
        job, progress = self.job, self.progress
        rows = self._rows(progress.global_batch_size)
        self.cursors = None if progress.cursors is None else [progress.cursors[row] for row in rows]
        return train_batches(
            job.data,
            self.tokenizer,
            seq_len=job.training.seq_len,
            lanes=progress.global_batch_size,
            rows=rows,
            seed=job.debug.seed,
            settings=job.training.dataloader,
            cursors=self.cursors,
        )

    def _train(self) -> int:
        job, world = self.job, self.world
        with agreed(world):
            batches = self._batches()
            if job.validation.enable:
                next(self._validation_batches())  # no documents to validate on: better now than after hours
        self.hooks = build_hooks(job, world.rank, world.device)
        reason = "failed"
        try:
            if world.rank == 0:
                write_whole(self.folder / "config.toml", to_toml(job))
                if job.job.print_config:
                    logger.info("Config:\n%s", to_toml(job))
            self.hooks.on_start(run_facts(self))
            if job.validation.enable and self.progress.step == 0:
                self._validate()
            self._steps(batches)
            stopped = self.progress.step < job.training.steps
            if stopped:
                reason = f"stopped: {self.stop.signal_name or 'a signal to another rank'}"
                return self._save_and_stop()
            self.checkpoints.wait(raises=True)
            reason = "completed"
        finally:
            self.hooks.on_end(reason)
            batches.close()
        log_samples(self.training, self.tokenizer, job.data.bos, job.generation)
        return 0

    def _steps(self, batches: TrainBatches) -> None:
        """Steps until the run is done or a signal came to any rank."""
        progress, world = self.progress, self.world
        while progress.step < self.job.training.steps:
            began = time.perf_counter()
            batch = next(batches)
            data_seconds = time.perf_counter() - began
            # All ranks' token counts and stop requests meet before a step; a request is served at the end of the last.
            n_read = self.training.objective.n_read(batch.targets, batch.documents)
            targets, tokens, stopping = world.total((batch.targets != IGNORE).sum().item(), n_read, bool(self.stop))
            if stopping:
                return
            result = step(self.training, self._micro_batches(batch), targets, progress.step)
            progress.step += 1
            progress.tokens_seen += int(tokens)
            self.cursors = batch.cursors
            self._after_step(result, int(tokens), data_seconds, time.perf_counter() - began)

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        size, mine = micro_batch_rows(self.job), self._rows(self.progress.global_batch_size)
        rows = torch.arange(mine.start, mine.stop)
        whole = (batch.tokens, batch.targets, batch.documents, rows)
        return [MicroBatch(*parts) for parts in zip(*(part.split(size) for part in whole), strict=True)]

    def _after_step(self, tensors: StepTensors, tokens: int, data_seconds: float, step_seconds: float) -> None:
        """Tells, validates and saves, as far as it is time for it."""
        job, progress = self.job, self.progress
        if not self.first_step_done:
            self.world.set_timeout(job.comm.train_timeout_seconds)
            self.first_step_done = True
        self.hooks.on_step(
            StepResult(
                step=progress.step,
                loss=tensors.loss,
                grad_norm=tensors.grad_norm,
                lr=tensors.lr,
                tokens_seen=progress.tokens_seen,
                tokens=tokens,
                data_seconds=data_seconds,
                step_seconds=step_seconds,
                work=tensors.work,
                extra=partial(metrics, self.training),
            )
        )
        last = progress.step == job.training.steps
        if job.validation.enable and (last or progress.step % job.validation.freq == 0):
            self._validate()
        self.checkpoints.poll()
        if self.checkpoints.due(progress.step, last):
            self._save(last)

    def _validate(self) -> None:
        batches = self._validation_batches()
        result = validate(self.training, batches, self.tokenizer.token_bytes, self.progress.step, self.stop)
        if result is not None:
            self.hooks.on_validation(result)

    def _validation_batches(self) -> Iterator[Batch]:
        job, world = self.job, self.world
        return validation_batches(
            job.data, job.validation, self.tokenizer, dp_rank=world.dp_rank, dp_size=world.dp_size
        )

    def _save_and_stop(self) -> int:
        """A signal came: saves what is not saved yet. 75 where the run can go on, 1 where nothing could be saved."""
        if not self.checkpoints.due(self.progress.step, last=True):
            logger.error("Stopped on a signal; nothing was saved: checkpoint.enable is false, or load_only is true")
            return 1
        self.checkpoints.wait()
        if self.progress.step > 0:
            self._save()
        self.checkpoints.wait(raises=True)
        return EXIT_STOPPED
