"""Saves that die or fail leave every earlier checkpoint good, and nothing half-written under a final name."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.helpers import STATE, forked, make_manager, make_tensors, same_bits, zeros_like
from titan_lite.checkpoint import folder as folder_module
from titan_lite.checkpoint import manager as manager_module
from titan_lite.checkpoint import writer as writer_module
from titan_lite.checkpoint.folder import list_steps
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.safetensors_file import HashingFile
from titan_lite.checkpoint.save import SaveError

EVENTS = ((os, "fsync"), (os, "rename"), (Path, "mkdir"), (HashingFile, "write"), (HashingFile, "close"), (os, "rmdir"))


def die_at(event: int) -> Callable[[], int]:
    """Kills this process, as `kill -9` would, right before the `event`-th operation on files; returns the counter."""
    count = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return operation

    for owner, name in EVENTS:
        setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: count


def good_steps(folder: Path) -> list[int]:
    """The listed steps; every one must load and hold what was saved for it."""
    steps = list_steps(folder)
    for step in steps:
        loaded = zeros_like(make_tensors())
        restore(folder / f"step-{step}", loaded)
        assert same_bits(loaded, make_tensors(step))
    return steps


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_kill_at_every_file_operation_of_a_save(tmp_path: Path, mode: str) -> None:
    def save_and_die(event: int) -> None:
        manager = make_manager(tmp_path, keep_latest_k=2, async_mode=mode)
        die_at(event)
        manager.save(30, make_tensors(30), STATE)
        manager.wait(raises=True)

    folder = tmp_path / "checkpoint"
    outcomes = []
    for event in range(1, 100):
        for step in (10, 20):
            if not (folder / f"step-{step}").exists():
                make_manager(tmp_path).save(step, make_tensors(step), STATE)
        code = forked(lambda event=event: save_and_die(event))  # type: ignore[misc]
        assert code in (0, -signal.SIGKILL)
        steps = good_steps(folder)
        outcomes.append(steps)
        assert steps in ([10, 20], [10, 20, 30], [20, 30]), f"killed at event {event}"
        make_manager(tmp_path)  # the next start collects what is left
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{step}" for step in steps]
        if 30 in steps:
            folder_module.remove_step(folder, 30)
        if code == 0:
            break
    assert outcomes[-1] == [20, 30]
    assert outcomes.count([10, 20]) > 10
    assert [10, 20, 30] in outcomes


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_overwriting_is_refused(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    manager = make_manager(tmp_path)
    step = tmp_path / "checkpoint" / "step-10"
    if kind == "folder":
        make_manager(tmp_path).save(10, make_tensors(10), STATE)
    elif kind == "empty folder":
        step.mkdir()
    elif kind == "file":
        step.write_text("mine")
    else:
        step.symlink_to(tmp_path / "nowhere")
    before = step.lstat()
    with pytest.raises(SaveError, match="step 10 was not saved: rank 0: a checkpoint is never overwritten"):
        manager.save(10, make_tensors(1), STATE, last=True)
    manager.save(10, make_tensors(1), STATE)
    assert "never overwritten" in caplog.text
    assert step.lstat() == before
    assert os.listdir(step.parent) == ["step-10"]
    if kind == "folder":
        assert good_steps(step.parent) == [10]


def test_a_disk_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(tmp_path)
    manager.save(10, make_tensors(10), STATE)
    monkeypatch.setattr(writer_module, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(SaveError) as error:
        manager.save(20, {"model.big": torch.zeros(1 << 20)}, STATE, last=True)
    assert f"no space left on {folder_module.mount_point(tmp_path)}: the checkpoint needs 4.1 MiB" in str(error.value)
    assert "1.0 MiB are free" in str(error.value)
    assert os.listdir(tmp_path / "checkpoint") == ["step-10"]


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    big = {"model.big": torch.ones(1 << 20)}

    def save_on_a_full_disk() -> None:
        manager = make_manager(tmp_path)
        manager.save(10, make_tensors(10), STATE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)
        )  # the write fails in the middle, as on a full disk
        caplog.clear()
        manager.save(20, big, STATE)
        (line,) = [
            record.getMessage()
            for record in caplog.records
            if record.name == manager_module.__name__ and record.levelno == logging.ERROR
        ]
        assert "step 20 was not saved: rank 0: File too large" in line
        assert "shard-00000.safetensors" in line
        assert "the newest checkpoint is step 10" in line
        assert manager.latest() == 10
        with pytest.raises(SaveError, match="step 30 was not saved"):
            manager.save(30, big, STATE, last=True)
        manager.save(40, make_tensors(40), STATE)  # training goes on, and saves what fits
        assert manager.latest() == 40

    assert forked(save_on_a_full_disk) == 0
    assert good_steps(tmp_path / "checkpoint") == [10, 40]
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step-10", "step-40"]


def test_no_space_left_names_mount_need_and_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HashingFile, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    manager = make_manager(tmp_path)
    monkeypatch.setattr(HashingFile, "write", full)
    with pytest.raises(SaveError, match=r"no space left on /.*: the checkpoint needs .* are free .*shard-00000"):
        manager.save(20, make_tensors(), STATE, last=True)
    assert os.listdir(tmp_path / "checkpoint") == []


def test_a_bug_in_a_save_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    manager = make_manager(tmp_path)
    monkeypatch.setattr(writer_module, "index_to_json", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        manager.save(20, make_tensors(), STATE)
    assert os.listdir(tmp_path / "checkpoint") == []
    assert make_manager(tmp_path).latest() is None
