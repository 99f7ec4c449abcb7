"""The checkpoints of a run: what to start from, when to save, how many to keep."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_lite.checkpoint.background import Background
from titan_lite.checkpoint.compare import model_problems, selects
from titan_lite.checkpoint.config import Checkpoint
from titan_lite.checkpoint.facts import Origin, RunFacts
from titan_lite.checkpoint.folder import (
    MANIFEST,
    collect_junk,
    damaged,
    find_checkpoint,
    list_steps,
    remove_step,
    retire_after,
    step_name,
)
from titan_lite.checkpoint.manifest import Manifest, read_manifest
from titan_lite.checkpoint.restore import MODEL, load_verified, read_index, read_train_state, verified_manifest
from titan_lite.checkpoint.save import SaveError, SaveRequest, write_step
from titan_lite.checkpoint.shard import shards_of
from titan_lite.checkpoint.staging import Snapshot
from titan_lite.checkpoint.world import World, agreed
from titan_lite.config.errors import BAD_INPUT, ConfigError, Problem
from titan_lite.config.load import job_from_toml

log = logging.getLogger(__name__)

# torchtitan's names for the parts of a checkpoint, as `exclude_from_loading` takes them
PARTS = {"optimizer": "optim", "dataloader": "cursors"}
CURSORS = PARTS["dataloader"]
MEMORY = "memory"
TRAIN_STATE = "train_state"
STEP = "step"


@dataclass(frozen=True)
class Start:
    """What a run starts from: a step folder of its own to go on from (`resume`), or another one to begin with."""

    folder: Path
    resume: bool
    model_only: bool
    in_hf: bool = False
    """The folder is a Hugging Face folder."""


class CheckpointManager:
    """Saves and loads the step folders of a run; the caller holds the run's lock.

    Every method but `due`, `latest` and `poll` is collective. Tensors are a flat dict: "model.<name>",
    "optim.<name>.<slot>". The train state is a JSON table; rank 0's is saved.
    """

    def __init__(self, config: Checkpoint, dump_folder: Path, world: World, facts: RunFacts) -> None:
        self.config = config
        self.world = world
        self.facts = facts
        self.folder = dump_folder / config.folder
        self.run_id = world.broadcast(uuid.uuid4().hex)
        self.parent: int | None = None
        self._writes = config.enable and not config.load_only
        self._background = Background()
        self._running: SaveRequest | None = None
        self._in_background = False
        self._failure: SaveError | None = None
        self._snapshot = Snapshot(keep=config.async_mode == "async_with_pinned_mem")
        if self._writes and world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"{self.folder} cannot be made: {error.strerror}"
                raise ConfigError.at("checkpoint.folder", why, config.folder) from None
            for name in collect_junk(self.folder):
                log.info("Removed %s, left by a save that did not finish.", self.folder / name)
        self._steps: list[int] = world.broadcast(list_steps(self.folder) if config.enable else [])

    def latest(self) -> int | None:
        """The newest step that has a checkpoint."""
        return max(self._steps, default=None)

    def due(self, step: int, last: bool = False) -> bool:
        """Whether the config asks for a save after `step`."""
        first = step == 1 and self.config.enable_first_step_checkpoint
        return self._writes and (last or first or step % self.config.interval == 0)

    # ---- loading

    def start(self) -> Start | None:
        """What to start from: `load_step`, else the run's newest checkpoint, else `initial_load_path`, else nothing."""
        if not self.config.enable:
            return None
        step = self.config.load_step
        if step >= 0 and step not in self._steps:
            have = ", ".join(map(str, self._steps)) or "none"
            raise ConfigError.at(
                "checkpoint.load_step",
                f"{self.folder} has no such step",
                step,
                f"the steps there ({have}), or -1: the newest",
            )
        if step < 0 and self._steps:
            step = self._steps[-1]
            if self.config.initial_load_path:
                self._say(
                    "Resuming from step %d: checkpoint.initial_load_path is only for a run without checkpoints.", step
                )
        if step >= 0:
            return Start(self.folder / step_name(step), resume=True, model_only=False)
        if not self.config.initial_load_path:
            return None
        given = Path(os.path.expanduser(self.config.initial_load_path))
        if self.config.initial_load_in_hf:
            return Start(given, resume=False, model_only=True, in_hf=True)
        with agreed(self.world):
            folder = find_checkpoint(given)
        return Start(folder, resume=False, model_only=self.config.initial_load_model_only)

    def finished(self, start: Start, steps: int) -> int | None:
        """The step of a run that has done all of its `steps` and kept only its weights: nothing to load then."""
        if start.in_hf:
            return None
        with agreed(self.world):
            manifest = read_manifest(start.folder)
        return manifest.step if start.resume and manifest.model_only and manifest.step >= steps else None

    def load(self, start: Start, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fills `tensors` in place and returns the train state ({} with `model_only`).

        Raises ConfigError, alike on every rank, for a damaged checkpoint or one that does not fit; nothing is changed
        then. Only after success are the steps later than `load_step` retired.
        """
        began = time.monotonic()
        if start.in_hf:
            self._load_hf(start, tensors)
            self._say("Loaded %s in %.2f seconds.", start.folder, time.monotonic() - began)
            return {}
        manifest = verified_manifest(start.folder, self.world)
        with agreed(self.world):
            if problems := self._misfits(start, manifest):
                raise ConfigError(problems)
            index = read_index(start.folder, manifest)
            state = {} if start.model_only else read_train_state(start.folder)
        parts = self._excluded(start, [*index, *tensors, *state])
        if {CURSORS, TRAIN_STATE} & set(parts):
            parts = [*parts, MEMORY]  # where lanes begin anew there is nothing to remember
        load_verified(start.folder, index, tensors, self.world, start.model_only, parts)
        if start.resume:
            self.run_id, self.parent = manifest.run_id, manifest.step
            self._retire_after(manifest.step)
        self._say("Loaded %s in %.2f seconds.", start.folder, time.monotonic() - began)
        return {} if TRAIN_STATE in parts else {key: value for key, value in state.items() if not selects(parts, key)}

    def _load_hf(self, start: Start, tensors: Mapping[str, Tensor]) -> None:
        from titan_lite.hf.fill import fill, opened

        parts = self._excluded(start, list(tensors))
        with agreed(self.world):
            model = job_from_toml(self.facts.config, start.folder).model
            quantized, compares = self.config.initial_load_in_hf_quantized, self.world.rank == 0
            source = opened(start.folder, model, quantized, compares)
        with agreed(self.world):
            fill(source, {name: tensor for name, tensor in tensors.items() if not selects(parts, name)})

    def _misfits(self, start: Start, manifest: Manifest) -> list[Problem]:
        """Why this run cannot go on from that checkpoint, names and shapes of tensors aside."""
        problems = []
        if manifest.model_only and not start.model_only:
            why = (
                "the checkpoint holds only the weights (checkpoint.last_save_model_only): no run can go on from it, "
                "but one with another job.dump_folder can start from it, with checkpoint.initial_load_path"
            )
            problems.append(damaged(start.folder / MANIFEST, why))
        differs = model_problems(start.folder, recorded_model(start.folder, manifest), self.facts.model)
        if start.resume:
            problems += differs
        elif self.world.rank == 0:
            for problem in differs:
                log.warning("%s: %s", problem.key, problem.why)
        if not start.model_only:
            for part, saved, ours in (
                ("tokenizer", manifest.tokenizer, self.facts.tokenizer),
                ("data", manifest.data, self.facts.data),
            ):
                left_out = part == "data" and CURSORS in self._parts()
                if saved and ours and saved != ours and not left_out:
                    what = f"another {part} (its files, or a setting of [{part}])"
                    why = f"{start.folder} was written with {what}: its fingerprint is {saved}, this run's {ours}"
                    problems.append(Problem(BAD_INPUT, part, why))
        return problems

    def _parts(self) -> list[str]:
        return [PARTS.get(name, name) for name in self.config.exclude_from_loading]

    def _excluded(self, start: Start, names: list[str]) -> list[str]:
        """What `exclude_from_loading` leaves out; one that selects none of the `names` of any rank is an error."""
        parts = self._parts()
        used = self.world.gather(
            [part for part in parts if any(selects([part], name) for name in [*names, TRAIN_STATE])]
        )
        for name, part in zip(self.config.exclude_from_loading, parts, strict=True):
            if not any(part in rank for rank in used) or (start.resume and part in (TRAIN_STATE, STEP)):
                why = f"nothing in {start.folder} has this name"
                if part in (TRAIN_STATE, STEP):
                    why = "a run that goes on needs it; one that starts anew gives checkpoint.initial_load_path"
                allowed = f"{MODEL}, optimizer, {TRAIN_STATE}, dataloader, or a tensor's name or its first parts"
                raise ConfigError.at("checkpoint.exclude_from_loading", why, name, allowed)
        return parts

    def _retire_after(self, step: int) -> None:
        if self._writes and any(later > step for later in self._steps):
            if self.world.rank == 0:
                for name in retire_after(self.folder, step):
                    log.warning("The run goes back to step %d: a later checkpoint is now called %s.", step, name)
            self._steps = [kept for kept in self._steps if kept <= step]

    # ---- saving

    def save(
        self, step: int, tensors: Mapping[str, Tensor], train_state: Mapping[str, Any], last: bool = False
    ) -> bool:
        """Saves `step`; returns once the tensors may change again, which in the background is when they are copied.

        Where the one before is still being written in the background, this one is left out with a warning.
        False where there was nothing to save, or the disk failed: a periodic save is then logged as an error, and
        training goes on; `last` raises SaveError.
        """
        background = self.config.async_mode != "disabled" and not last
        self.poll()
        if background and any(self.world.gather(self._running is not None)):
            if self.world.rank == 0:
                log.warning("Step %d is not saved: the checkpoint before it is still being written.", step)
            return False
        self.wait()
        if step in self._steps and step == self.parent:
            return False  # this very state is on disk
        model_only = last and self.config.last_save_model_only
        request = SaveRequest(
            self.folder,
            Origin(self.run_id, step, self.parent, model_only, self.world.size),
            shards_of(self._export(tensors) if model_only else tensors),
            json.dumps(train_state).encode(),
        )
        self._in_background = background
        if background:
            request = replace(request, shards=self._snapshot(request.shards))
        self._running = request
        self._background.start(lambda: self._write(request))
        if not background:
            self._settle(wait=True, raises=last)
        return self._failure is None

    def poll(self) -> None:
        """Each step: reports a background save that has ended meanwhile. Not collective, never waits."""
        self._settle(wait=False, raises=False)

    def wait(self, raises: bool = False) -> None:
        """Waits for a save still running.

        With `raises` it is an error that the newest save has failed, whenever that was: where a run ends, or stops on a
        signal, its state has to be on disk.
        """
        self._settle(wait=True, raises=raises)
        if raises and self._failure is not None:
            raise self._failure

    def _write(self, request: SaveRequest) -> None:
        began = time.monotonic()
        write_step(request, self.facts, self.world)
        step = request.origin.step
        if self._in_background:
            self._say(
                "Saved %s in the background in %.2f seconds", self.folder / step_name(step), time.monotonic() - began
            )
        if self.world.rank == 0 and self.config.keep_latest_k:
            self._prune(step)

    def _settle(self, wait: bool, raises: bool) -> None:
        """Takes note of a save that has ended."""
        request = self._running
        if request is None or not (wait or self._background.idle()):
            return
        self._running = None
        try:
            self._background.join()
        except SaveError as error:
            self._failure = error
            if raises:
                raise
            if self.world.rank == 0:
                log.error("%s. Training goes on; the newest checkpoint is step %s.", error, self.latest())
            return
        self._failure = None
        self.parent = request.origin.step
        self._steps = steps_after(self._steps, self.parent, self.config.keep_latest_k)

    def _prune(self, written: int) -> None:
        """Deletes what `keep_latest_k` does not keep (rank 0)."""
        steps = list_steps(self.folder)
        try:
            for step in set(steps) - set(steps_after(steps, written, self.config.keep_latest_k)):
                remove_step(self.folder, step)
        except OSError as error:
            log.warning("Old checkpoints could not be removed: %s", error)

    def _export(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights in `export_dtype`; integers stay what they are."""
        dtype = getattr(torch, self.config.export_dtype)
        weights = {name: tensor.detach() for name, tensor in tensors.items() if selects([MODEL], name)}
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}

    def _say(self, text: str, *args: object) -> None:
        if self.world.rank == 0:
            log.info(text, *args)


def recorded_model(folder: Path, manifest: Manifest) -> Mapping[str, Any]:
    """What a checkpoint's model is, in the keys that there are now: its config does not have those that came later,
    whose defaults are what was before them. As it was written where the config cannot be read any more.
    """
    try:
        model: Mapping[str, Any] = job_from_toml(manifest.config, folder).model.identity()
    except ConfigError:
        return manifest.model.config
    return model


def steps_after(steps: list[int], written: int, keep: int) -> list[int]:
    """The steps that are left once `written` is saved: the newest `keep` (0: all), and `written` in any case."""
    everything = sorted({*steps, written})
    return sorted({*(everything[-keep:] if keep else everything), written})
