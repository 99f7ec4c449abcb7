"""Whatever kills a run, starting it again goes on as if nothing had happened: bitwise, or with the same tokens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from titan_lite import trainer
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import load_job, to_toml
from titan_lite.run.signals import EXIT_STOPPED, StopFlag
from titan_lite.run.validate import validate
from titan_lite.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
LOSS_RTOL = 1e-5
"""fp32, another layout."""

CONFIG = """
[model]
dim = 32
n_layers = 2
attention = { n_heads = 4, n_kv_heads = 2, masks = ["causal", "document"] }
ffn = { hidden = 48 }

[data]
held_out = 0.1
source = { type = "files", path = "DOCUMENTS" }

[training]
local_batch_size = 2
global_batch_size = 8
seq_len = 32
steps = 120
mixed_precision_param = "float32"

[optimizer]
lr = 1e-3

[lr_scheduler]
warmup_steps = 10

[activation_checkpoint]
mode = "none"

[checkpoint]
enable = true
interval = 30

[validation]
enable = true
freq = 60
steps = 2
local_batch_size = 2
seq_len = 32

[metrics]
log_freq = 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = [json.dumps({"text": f"document {i} " + "abc def " * (i % 37)}) for i in range(400)]
    (folder / "documents.jsonl").write_text("\n".join(rows))
    path = folder / "config.toml"
    path.write_text(CONFIG.replace("DOCUMENTS", str(folder / "documents.jsonl")))
    return path


def losses(folder: Path) -> dict[int, str]:
    """Loss and gradient norm of every logged step, as exact text."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: f"{line['loss']!r} {line['grad_norm']!r}" for line in lines if "loss" in line}


def tensors(step_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every shard file."""
    return {
        f"{path.name} {name}": tensor
        for path in sorted(step_folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- real processes


class Launched:
    """`python -m titan_lite.launch` on two ranks."""

    def __init__(self, config: Path, dump_folder: Path, *overrides: str):
        self.folder = dump_folder
        command = [
            sys.executable,
            "-m",
            "titan_lite.launch",
            str(config),
            f"--job.dump_folder={dump_folder}",
            *overrides,
        ]
        self.log = dump_folder.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"NGPU": "2"}, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def workers(self) -> list[int]:
        """Pids of this run's processes, the launcher aside."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if f"--job.dump_folder={self.folder}".encode() in command.split(b"\0"):
                    found.append(int(entry.name))
        return found

    def until_step(self, step: int, timeout: float = 120) -> None:
        """Waits until a checkpoint of `step` or later is there and a few steps more were logged."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            saved = [int(path.name[5:]) for path in (self.folder / "checkpoint").glob("step-*") if "." not in path.name]
            if max(saved, default=0) >= step and max(losses(self.folder)) > max(saved) + 3:
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached:\n{self.log.read_text()[-3000:]}")


def assert_same_run(a: Launched, b: Launched) -> None:
    """Every step of both was logged once, with the same bits, and the last checkpoints hold the same bits."""
    assert list(losses(a.folder)) == list(range(1, 121))
    assert losses(a.folder) == losses(b.folder)
    assert_same_tensors(a.folder / "checkpoint" / "step-120", b.folder / "checkpoint" / "step-120")


def test_a_run_that_is_killed_and_stopped_is_bitwise_the_same(config: Path, tmp_path: Path):
    """Killed worker, killed launcher, signal: each once, in one run, compared with a run that nothing happened to."""
    straight = Launched(config, tmp_path / "straight")
    assert straight.wait() == 0, straight.log.read_text()

    worker_dies = Launched(config, tmp_path / "killed")
    worker_dies.until_step(30)
    os.kill(max(worker_dies.workers()), signal.SIGKILL)
    assert worker_dies.wait() == 1

    launcher_dies = Launched(config, tmp_path / "killed")
    launcher_dies.until_step(60)
    launcher_dies.process.kill()
    deadline = time.monotonic() + 5
    while launcher_dies.workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert launcher_dies.workers() == []
    launcher_dies.wait()

    stopped = Launched(config, tmp_path / "killed")
    stopped.until_step(90)
    stopped.process.send_signal(signal.SIGUSR1)
    assert stopped.wait() == EXIT_STOPPED, stopped.log.read_text()
    newest = max(int(path.name.removeprefix("step-")) for path in (stopped.folder / "checkpoint").glob("step-*"))
    assert newest == max(losses(stopped.folder)) > 90  # saved at the end of the very step

    last = Launched(config, tmp_path / "killed")
    assert last.wait() == 0, last.log.read_text()
    assert_same_run(last, straight)


def test_kill_and_resume_is_bitwise_compiled(config: Path, tmp_path: Path):
    overrides = ("--compile.enable", "--checkpoint.async_mode=async")
    straight = Launched(config, tmp_path / "straight", *overrides)
    assert straight.wait() == 0, straight.log.read_text()
    killed = Launched(config, tmp_path / "killed", *overrides)
    killed.until_step(30)
    os.kill(max(killed.workers()), signal.SIGKILL)
    assert killed.wait() == 1
    last = Launched(config, tmp_path / "killed", *overrides)
    assert last.wait() == 0, last.log.read_text()
    assert_same_run(last, straight)


# ---- inside this process and the pools


def run_trainer(config: Path, dump_folder: Path, *overrides: str) -> int:
    """A whole run in this process, or as one rank of a pool."""
    return Trainer(load_job(config, [f"--job.dump_folder={dump_folder}", *overrides]), StopFlag()).run()


SHORT = ("--checkpoint.interval=4", "--checkpoint.async_mode=disabled", "--validation.no_enable")


def test_two_ranks_resume_on_one_and_on_four(config: Path, tmp_path: Path, pool2, pool4):
    steps = "--training.steps={}".format
    schedule = "--lr_scheduler.total_steps=12"
    assert run_trainer(config, tmp_path / "one", steps(12), schedule, *SHORT) == 0
    assert pool2.run(run_trainer, config, tmp_path / "two", steps(4), schedule, *SHORT) == [0, 0]
    for name, go_on, local in (
        ("on one", lambda *a: [run_trainer(*a)], 2),
        ("on two", lambda *a: pool2.run(run_trainer, *a), 2),
        ("on four", lambda *a: pool4.run(run_trainer, *a), 2),
        ("on one, uneven", lambda *a: [run_trainer(*a)], 3),
        ("on four, larger than the share", lambda *a: pool4.run(run_trainer, *a), 5),
    ):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "two", folder)
        sizes = (f"--training.local_batch_size={local}", "--training.global_batch_size=-1")
        assert set(go_on(config, folder, steps(12), schedule, *sizes, *SHORT)) == {0}
        expected, got = losses(tmp_path / "one"), losses(folder)
        assert list(got) == list(range(1, 13))
        for step, text in expected.items():
            loss, other = float(text.split()[0]), float(got[step].split()[0])
            assert other == pytest.approx(loss, rel=LOSS_RTOL), (name, step)
        # The cursors say which tokens come next: the lanes are where they are on one rank.
        states = [
            json.loads((f / "checkpoint/step-12/train_state.json").read_text()) for f in (tmp_path / "one", folder)
        ]
        assert states[0]["cursors"] == states[1]["cursors"]
        assert states[0]["tokens_seen"] == states[1]["tokens_seen"] == 12 * 8 * 32


def test_validation_leaves_the_checkpoint_whole(config: Path, tmp_path: Path, pool2):
    """Gathered parameters of a forward without backward are no parameters to save."""
    changes = ("--training.mixed_precision_param=bfloat16", "--validation.freq=2", "--checkpoint.interval=2")
    assert pool2.run(run_trainer, config, tmp_path, "--training.steps=4", *changes) == [0, 0]
    saved = tensors(tmp_path / "checkpoint" / "step-4")
    assert {tensor.dtype for name, tensor in saved.items()} == {torch.float32}
    assert pool2.run(run_trainer, config, tmp_path, "--training.steps=6", *changes) == [0, 0]


def resumed_weights(config: Path, dump_folder: Path, *overrides: str) -> dict[str, Any]:
    """The weights right after resuming, by parameter name, as this rank holds them."""
    from tests.runs import full
    from titan_lite.checkpoint.state import model_tensors

    run = Trainer(load_job(config, [f"--job.dump_folder={dump_folder}", *overrides]), StopFlag())
    assert run.run() == 0  # at its last step already: it only loads
    return {name: full(tensor) for name, tensor in model_tensors(run.training.model).items()}


def test_resumed_weights_equal_the_saved_run(config: Path, tmp_path: Path, pool2):
    overrides = ("--training.steps=4", *SHORT)
    run = Trainer(load_job(config, [f"--job.dump_folder={tmp_path}", *overrides]), StopFlag())
    assert run.run() == 0
    running = dict(run.training.model.named_parameters())
    for weights in (
        resumed_weights(config, tmp_path, *overrides),
        pool2.run(resumed_weights, config, tmp_path, *overrides)[0],
    ):
        assert weights.keys() == {f"model.{name}" for name in running}
        assert all(torch.equal(weights[f"model.{name}"], parameter) for name, parameter in running.items())


def test_finished_run_changes_nothing(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    overrides = ("--training.steps=4", *SHORT)
    assert run_trainer(config, tmp_path, *overrides) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        assert run_trainer(config, tmp_path, *overrides) == 0
    assert "step 4 of 4" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resolved_config_is_written_and_loads_back(config: Path, tmp_path: Path):
    overrides = (f"--job.dump_folder={tmp_path}", "--training.steps=4", *SHORT)
    assert run_trainer(config, tmp_path, *overrides) == 0
    job = load_job(config, overrides)
    assert load_job(tmp_path / "config.toml") == job
    assert (tmp_path / "config.toml").read_text() == to_toml(job)


@pytest.mark.parametrize(
    ("override", "key"),
    [("--training.global_batch_size=4", "training.global_batch_size"), ("--debug.seed=1", "debug.seed")],
)
def test_what_the_lanes_depend_on_stays(config: Path, tmp_path: Path, override: str, key: str):
    overrides = ("--training.steps=4", *SHORT)
    assert run_trainer(config, tmp_path, *overrides) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    go_on = ("--training.steps=6", "--checkpoint.interval=2", "--validation.no_enable")
    with pytest.raises(ConfigError, match=key):
        run_trainer(config, tmp_path, *go_on, override)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # Where the data are to start again, both are free.
    assert run_trainer(config, tmp_path, *go_on, override, "--checkpoint.exclude_from_loading=dataloader") == 0
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    # From there on, what was chosen anew is what stays.
    longer = ("--training.steps=8", *go_on[1:])
    with pytest.raises(ConfigError, match=key):
        run_trainer(config, tmp_path, *longer)
    assert run_trainer(config, tmp_path, *longer, override) == 0


def test_a_signal_during_validation_saves_at_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    overrides = (f"--job.dump_folder={tmp_path}", "--validation.freq=2", "--checkpoint.interval=100")
    run = Trainer(load_job(config, overrides), StopFlag())

    def validate_and_be_asked_to_stop(*arguments: Any) -> Any:
        if arguments[3] == 2:
            run.stop.signal_name = "SIGTERM"
        return validate(*arguments)

    monkeypatch.setattr(trainer, "validate", validate_and_be_asked_to_stop)
    assert run.run() == EXIT_STOPPED
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-2"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0]


def test_exported_weights_start_another_run(config: Path, tmp_path: Path):
    """Saved in bfloat16, read into float32: the values of bfloat16, and a finished run says so."""
    export = ("--training.steps=2", "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16", *SHORT)
    assert run_trainer(config, tmp_path / "a", *export) == 0
    assert run_trainer(config, tmp_path / "a", *export) == 0
    start = (f"--checkpoint.initial_load_path={tmp_path / 'a'}", "--training.steps=1", "--optimizer.lr=1e-30", *SHORT)
    assert run_trainer(config, tmp_path / "b", *start) == 0
    exported = {name: tensor.float() for name, tensor in tensors(tmp_path / "a/checkpoint/step-2").items()}
    begun = {name: tensor for name, tensor in tensors(tmp_path / "b/checkpoint/step-1").items() if " model." in name}
    assert exported.keys() == begun.keys()
    assert all(torch.equal(exported[name], begun[name]) for name in begun)


def test_weights_that_should_have_another_length_are_told(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A model whose matrices have vectors of length 1 starts from one whose matrices do not."""
    ngpt = ("--model.residual.type=ngpt", "--model.norm.type=none", "--training.steps=1", *SHORT)
    unit = (*ngpt, "--model.linear.type=unit", f"--checkpoint.initial_load_path={tmp_path / 'a'}")
    assert run_trainer(config, tmp_path / "a", *ngpt) == 0
    assert run_trainer(config, tmp_path / "b", *unit) == 0
    named = [record.getMessage().split(",")[0] for record in caplog.records if "vectors of length" in record.message]
    assert "stack.blocks.0.attention.o.weight" in named
    assert len(named) == 2 * 7 + 1  # all matrices of both layers, and the head's
    caplog.clear()
    assert run_trainer(config, tmp_path / "b", *unit, "--training.steps=2") == 0
    assert not [record for record in caplog.records if "vectors of length" in record.message]


def test_a_folder_of_another_run_is_left_alone(config: Path, tmp_path: Path):
    overrides = ("--training.steps=2", "--validation.no_enable", "--checkpoint.no_enable")
    assert run_trainer(config, tmp_path, *overrides) == 0
    before = (tmp_path / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"model\.ffn\.hidden"):
        run_trainer(config, tmp_path, *overrides, "--model.ffn.hidden=64")
    assert (tmp_path / "config.toml").read_text() == before
    assert run_trainer(config, tmp_path, "--training.steps=2", *SHORT) == 0
    with pytest.raises(ConfigError, match=r"checkpoint\.enable"):
        run_trainer(config, tmp_path, *overrides)


def test_optimizer_left_out_starts_fresh(config: Path, tmp_path: Path):
    overrides = ("--training.steps=3", "--checkpoint.interval=2", "--checkpoint.exclude_from_loading=optimizer")
    assert run_trainer(config, tmp_path, "--training.steps=2", *SHORT) == 0
    assert run_trainer(config, tmp_path, *overrides, "--validation.no_enable") == 0
    saved = tensors(tmp_path / "checkpoint/step-3")
    assert {float(value) for name, value in saved.items() if name.endswith(".step")} == {1.0}
