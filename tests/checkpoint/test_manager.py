"""What a run starts from, when it saves, what it keeps."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

import pytest
import torch

from tests.checkpoint.helpers import FACTS, STATE, make_manager, make_tensors, same_bits, zeros_like
from titan_lite.checkpoint import writer
from titan_lite.checkpoint.folder import find_checkpoint, list_steps
from titan_lite.checkpoint.manager import CheckpointManager
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.save import SaveError
from titan_lite.config.errors import ConfigError


def save_steps(folder: Path, *steps: int, **config: object) -> CheckpointManager:
    manager = make_manager(folder, **config)
    for step in steps:
        manager.save(step, make_tensors(step), STATE | {"step": step})
    return manager


def resumed(manager: CheckpointManager) -> int:
    """Loads what the manager starts from and returns the step that the values belong to."""
    start = manager.start()
    assert start is not None
    tensors = zeros_like(make_tensors())
    step = manager.load(start, tensors)["step"]
    assert same_bits(tensors, make_tensors(step))
    return step


def load_error(manager: CheckpointManager) -> str:
    start = manager.start()
    assert start is not None
    with pytest.raises(ConfigError) as error:
        manager.load(start, make_tensors())
    return str(error.value)


# ---- starting


def test_the_newest_step_wins_over_initial_load_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save_steps(tmp_path / "other", 5)
    manager = make_manager(tmp_path / "mine", initial_load_path=str(tmp_path / "other"))
    start = manager.start()
    assert start is not None
    assert (start.folder, start.resume, start.model_only) == (tmp_path / "other/checkpoint/step-5", False, True)
    save_steps(tmp_path / "mine", 10, 9, 100)
    manager = make_manager(tmp_path / "mine", initial_load_path=str(tmp_path / "other"))
    assert (manager.latest(), resumed(manager)) == (100, 100)  # by number: neither as text nor by time
    assert "initial_load_path is only for a run without checkpoints" in caplog.text


def test_a_run_without_anything_starts_from_nothing(tmp_path: Path) -> None:
    manager = make_manager(tmp_path)
    assert (manager.latest(), manager.start()) == (None, None)
    save_steps(tmp_path, 10)
    assert make_manager(tmp_path, enable=False).start() is None


def test_initial_load_takes_weights_only_and_starts_a_run_of_its_own(tmp_path: Path) -> None:
    first = save_steps(tmp_path / "a", 5)
    manager = make_manager(tmp_path / "b", initial_load_path=str(tmp_path / "a"))
    start = manager.start()
    assert start is not None
    tensors = zeros_like(make_tensors())
    assert manager.load(start, tensors) == {}
    assert torch.equal(tensors["model.w"], make_tensors(5)["model.w"])
    assert not tensors["optim.w.exp_avg"].any()
    assert manager.run_id != first.run_id
    assert manager.parent is None
    everything = make_manager(tmp_path / "b", initial_load_path=str(tmp_path / "a"), initial_load_model_only=False)
    assert resumed(everything) == 5
    assert list_steps(tmp_path / "a/checkpoint") == [5]


def test_load_step_goes_back_and_retires_what_is_later(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30)
    manager = make_manager(tmp_path, load_step=10)
    assert manager.latest() == 30
    assert list_steps(tmp_path / "checkpoint") == [10, 20, 30]  # nothing moves before the load has succeeded
    assert resumed(manager) == 10
    assert manager.latest() == 10
    manager.save(15, make_tensors(15), STATE | {"step": 15})
    assert read_manifest(tmp_path / "checkpoint/step-15").parent_step == 10
    assert resumed(make_manager(tmp_path)) == 15  # not 30, the abandoned branch
    retired = sorted(path.name.partition(".retired-")[0] for path in (tmp_path / "checkpoint").glob("*.retired-*"))
    assert retired == ["step-20", "step-30"]
    kept = next((tmp_path / "checkpoint").glob("step-30.retired-*"))
    restore(kept, make_tensors())


def test_a_failed_load_retires_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    (tmp_path / "checkpoint/step-10/train_state.json").unlink()
    assert "train_state.json" in load_error(make_manager(tmp_path, load_step=10))
    assert list_steps(tmp_path / "checkpoint") == [10, 20]


def test_a_load_step_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    with pytest.raises(ConfigError, match=r"checkpoint\.load_step = 15\n.*has no such step\n.*10, 20"):
        make_manager(tmp_path, load_step=15).start()


def test_load_only_neither_saves_nor_moves_anything(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    junk = tmp_path / "checkpoint/step-30.tmp-0123456789ab"
    junk.mkdir()
    manager = make_manager(tmp_path, load_only=True, load_step=10)
    assert resumed(manager) == 10
    assert not manager.due(10, last=True)
    assert list_steps(tmp_path / "checkpoint") == [10, 20]
    assert junk.exists()


def test_another_model_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    facts = dataclasses.replace(FACTS, model={"dim": 4, "attention": {"n_heads": 4, "type": "gqa"}})
    text = load_error(make_manager(tmp_path, facts=facts))
    assert "model.attention.n_heads\n" in text
    assert "there it is 2, here 4" in text
    assert 'there it is absent, here "gqa"' in text
    assert "model.dim" not in text
    start = make_manager(tmp_path / "new", facts=facts, initial_load_path=str(tmp_path))
    assert start.load(start.start(), make_tensors()) == {}  # type: ignore[arg-type]


def test_another_tokenizer_or_data_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    assert "its fingerprint is t0, this run's t1" in load_error(
        make_manager(tmp_path, facts=dataclasses.replace(FACTS, tokenizer="t1"))
    )
    data = dataclasses.replace(FACTS, data="d1")
    assert "its fingerprint is d0, this run's d1" in load_error(make_manager(tmp_path, facts=data))
    manager = make_manager(tmp_path, facts=data, exclude_from_loading=("dataloader",))
    start = manager.start()
    assert start is not None
    assert manager.load(start, make_tensors()) == {"step": 10, "tokens_seen": STATE["tokens_seen"]}


@pytest.mark.parametrize(
    ("part", "kept", "state"),
    [
        (
            "optimizer",
            ["optim.w.exp_avg", "optim.w.step", "optim.b.exp_avg", "optim.b.step"],
            {"step", "tokens_seen", "cursors"},
        ),
        ("model.w", ["model.w"], {"step", "tokens_seen", "cursors"}),
        ("tokens_seen", [], {"step", "cursors"}),
    ],
)
def test_exclude_from_loading(tmp_path: Path, part: str, kept: list[str], state: set[str]) -> None:
    save_steps(tmp_path, 10)
    manager = make_manager(tmp_path, exclude_from_loading=(part,))
    tensors = make_tensors(99)
    start = manager.start()
    assert start is not None
    assert manager.load(start, tensors).keys() == state
    same = [name for name in tensors if torch.equal(tensors[name], make_tensors(99)[name])]
    assert sorted(same) == sorted(kept)


def test_excluding_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    text = load_error(make_manager(tmp_path, exclude_from_loading=("optimizr",)))
    assert 'checkpoint.exclude_from_loading = "optimizr"' in text


@pytest.mark.parametrize("part", ["train_state", "step"])
def test_a_run_that_goes_on_needs_its_step(tmp_path: Path, part: str) -> None:
    save_steps(tmp_path / "a", 10)
    assert "a run that goes on needs it" in load_error(make_manager(tmp_path / "a", exclude_from_loading=(part,)))
    config = {"initial_load_path": str(tmp_path / "a"), "initial_load_model_only": False}
    manager = make_manager(tmp_path / "b", exclude_from_loading=(part,), **config)
    start = manager.start()
    assert start is not None
    assert "step" not in manager.load(start, make_tensors())


def test_an_excluded_tensor_may_be_absent_on_either_side(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    manager = make_manager(tmp_path, exclude_from_loading=("model.b", "optim.b"))
    tensors = {name: tensor for name, tensor in make_tensors().items() if ".b" not in name}
    tensors["model.b.new"] = torch.ones(3)
    start = manager.start()
    assert start is not None
    manager.load(start, tensors)
    assert torch.equal(tensors["model.w"], make_tensors(10)["model.w"])
    assert torch.equal(tensors["model.b.new"], torch.ones(3))


# ---- saving


def test_when_a_save_is_due(tmp_path: Path) -> None:
    manager = make_manager(tmp_path, interval=4, enable_first_step_checkpoint=True)
    assert [step for step in range(1, 11) if manager.due(step, last=step == 10)] == [1, 4, 8, 10]
    assert [step for step in range(1, 11) if make_manager(tmp_path, interval=4).due(step)] == [4, 8]
    assert not make_manager(tmp_path, enable=False).due(4, last=True)


def test_the_newest_k_are_kept(tmp_path: Path) -> None:
    manager = make_manager(tmp_path, keep_latest_k=2)
    for step in (10, 20, 30, 40):
        manager.save(step, make_tensors(step), STATE)
    assert list_steps(tmp_path / "checkpoint") == [30, 40]
    assert manager.latest() == 40
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2
    save_steps(tmp_path, 50, keep_latest_k=0)
    assert list_steps(tmp_path / "checkpoint") == [30, 40, 50]


def test_saving_what_has_just_been_saved_or_loaded_does_nothing(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, 10)
    manifest = (tmp_path / "checkpoint/step-10/manifest.json").read_bytes()
    manager.save(10, make_tensors(10), STATE)
    resuming = make_manager(tmp_path)
    assert resumed(resuming) == 10
    resuming.save(10, make_tensors(10), STATE, last=True)
    assert (tmp_path / "checkpoint/step-10/manifest.json").read_bytes() == manifest


def test_last_save_model_only_exports_and_cannot_be_resumed(tmp_path: Path) -> None:
    config = {"last_save_model_only": True, "export_dtype": "bfloat16"}
    manager = save_steps(tmp_path, 10, **config)
    tensors = make_tensors(20) | {"model.ids": torch.arange(3)}
    manager.save(20, tensors, STATE, last=True)
    step = tmp_path / "checkpoint/step-20"
    loaded = {
        "model.w": torch.zeros(9, 5).bfloat16(),
        "model.b": torch.zeros(9).bfloat16(),
        "model.ids": torch.zeros(3, dtype=torch.int64),
    }
    restore(step, loaded)
    assert torch.equal(loaded["model.w"], tensors["model.w"].bfloat16())
    assert torch.equal(loaded["model.ids"], torch.arange(3))
    assert read_manifest(step).model_only
    text = load_error(make_manager(tmp_path))
    assert "holds only the weights" in text
    assert "--checkpoint.load_step=10" in text
    assert resumed(make_manager(tmp_path, load_step=10)) == 10


# ---- in the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves wait, before they write, until the gate is set."""
    event = threading.Event()
    original = writer.write_safetensors

    def gated(*args: object) -> object:
        assert event.wait(10)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_safetensors", gated)
    return event


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_async_saves_the_values_of_the_call_and_does_not_wait(tmp_path: Path, gate: threading.Event, mode: str) -> None:
    manager = make_manager(tmp_path, async_mode=mode)
    for step in (10, 20):  # twice: kept buffers are written again
        tensors, state = make_tensors(step), STATE | {"step": step}
        gate.clear()
        manager.save(step, tensors, state)
        for tensor in tensors.values():
            tensor.fill_(-1)
        state["step"] = -1
        manager.poll()
        assert manager.latest() == (None if step == 10 else 10)  # still running
        assert not (tmp_path / f"checkpoint/step-{step}").exists()
        gate.set()
        manager.wait(raises=True)
        assert resumed(make_manager(tmp_path)) == step


def test_a_background_save_never_makes_training_wait_for_the_one_that_runs(
    tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(tmp_path, async_mode="async")
    assert manager.save(10, make_tensors(10), STATE)
    assert not manager.save(20, make_tensors(20), STATE)  # step 10 is still being written: left out
    assert "Step 20 is not saved" in caplog.text
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    assert manager.save(30, make_tensors(30), STATE, last=True)  # the last one waits, and is not in the background
    assert list_steps(tmp_path / "checkpoint") == [10, 30]
    assert read_manifest(tmp_path / "checkpoint/step-30").parent_step == 10


def test_a_background_failure_is_reported_at_the_next_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(tmp_path, async_mode="async")
    monkeypatch.setattr(writer, "free_bytes", lambda path: 0)
    manager.save(10, make_tensors(10), STATE)
    manager._background.thread.join()  # type: ignore[union-attr]
    assert "was not saved" not in caplog.text
    manager.poll()
    assert "step 10 was not saved: rank 0: no space left" in caplog.text
    manager.poll()
    assert caplog.text.count("step 10 was not saved") == 1
    manager.save(20, make_tensors(20), STATE)
    with pytest.raises(SaveError, match="step 20 was not saved"):
        manager.wait(raises=True)
    monkeypatch.undo()
    manager.save(30, make_tensors(30), STATE)
    manager.wait(raises=True)
    assert list_steps(tmp_path / "checkpoint") == [30]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_end_of_a_run_does_not_pass_over_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    manager = make_manager(tmp_path, async_mode=mode)
    with monkeypatch.context() as full:
        full.setattr(writer, "free_bytes", lambda path: 0)
        manager.save(10, make_tensors(10), STATE)  # periodic: training goes on
        manager.poll()
        with pytest.raises(SaveError, match="step 10 was not saved"):
            manager.wait(raises=True)
    manager.save(20, make_tensors(20), STATE)
    manager.wait(raises=True)  # a later save that succeeded makes up for it


def test_a_bug_in_the_background_is_raised_at_the_next_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(tmp_path, async_mode="async")
    monkeypatch.setattr(writer, "write_file", None)
    manager.save(10, make_tensors(10), STATE)
    with pytest.raises(TypeError):
        manager.wait()
    manager.poll()
    assert manager.latest() is None


# ---- finding


def test_find_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", 9, 10)
    step = tmp_path / "run/checkpoint/step-10"
    assert find_checkpoint(step) == step
    assert find_checkpoint(step.parent) == step
    assert find_checkpoint(str(tmp_path / "run")) == step
    older = tmp_path / "run/checkpoint/step-9"
    assert find_checkpoint(older) == older
    renamed = older.rename(tmp_path / "my best model")
    assert find_checkpoint(renamed) == renamed


def test_find_checkpoint_refuses_what_is_none(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "absent", "the folder does not exist"),
        (tmp_path / "step-3", "this checkpoint folder does not exist"),
        (tmp_path, "there is no checkpoint in it"),
    ):
        with pytest.raises(ConfigError, match=why):
            find_checkpoint(path)
    (tmp_path / "a/step-1").mkdir(parents=True)
    (tmp_path / "b/step-1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="more than one folder in it has checkpoints: a, b"):
        find_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"manifest\.json\n.*the file is missing"):
        restore(find_checkpoint(tmp_path / "a"), {})
