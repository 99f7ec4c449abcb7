"""metrics.jsonl: keys, exact numbers, flushing, resuming."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from tests.run.facts import logged_step, logged_validation, run_facts, step_result
from titan_lite.run.hooks import ValidationResult
from titan_lite.run.jsonl import JsonLines
from titan_lite.run.metrics import MetricsHook

KEYS = [
    *("step", "loss", "grad_norm", "lr", "tokens_seen"),
    *("tokens_per_second", "mfu", "memory_gib", "data_seconds", "step_seconds"),
]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def started(path: Path, start_step: int = 0) -> JsonLines:
    sink = JsonLines(path)
    sink.start(run_facts(path.parent, start_step=start_step))
    return sink


def test_a_step_has_exactly_the_contract_keys_and_exact_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hook = MetricsHook(1, [JsonLines(path)], torch.device("cpu"))
    hook.on_start(run_facts(tmp_path, peak_flops=None))
    loss = torch.tensor(2 / 3)
    hook.on_step(step_result(1, loss=loss, extra=lambda: {"z_loss": 1 / 7}))
    (line,) = lines(path)  # before the end: every line is flushed
    assert list(line) == [*KEYS, "z_loss"]
    assert line["loss"] == loss.item()
    assert line["grad_norm"] == 0.1 + 0.2
    assert line["lr"] == 8e-4 / 3
    assert line["z_loss"] == 1 / 7
    assert line["mfu"] is None
    assert (line["step"], line["tokens_seen"], line["data_seconds"]) == (1, 1000, 0.0625)
    assert isinstance(line["memory_gib"], float)
    assert 0.01 < line["memory_gib"] < 100


def test_a_validation_line_has_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hook = MetricsHook(1, [JsonLines(path)], torch.device("cpu"))
    hook.on_start(run_facts(tmp_path))
    hook.on_validation(ValidationResult(7, 2 / 3, 1 / 3, tokens=10, seconds=1.0))
    assert lines(path) == [{"step": 7, "validation_loss": 2 / 3, "validation_bits_per_byte": 1 / 3}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    started(path).step(logged_step(loss=value))
    assert lines(path)[0]["loss"] is None


@pytest.mark.parametrize("half", [b"", b'{"st', b'{"step": 2}'], ids=["none", "half a line", "no line end"])
def test_resume_removes_later_lines_and_a_half_line(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = started(path)
    for step in (1, 10, 20):
        sink.step(logged_step(step))
    sink.validation(logged_validation(20))
    for step in (30, 40):
        sink.step(logged_step(step))
    sink.validation(logged_validation(40))
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + half)
    sink = started(path, start_step=20)
    assert path.read_bytes().splitlines(keepends=True) == before[:4]
    sink.step(logged_step(30))
    assert [line["step"] for line in lines(path)] == [1, 10, 20, 20, 30]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_leaves_an_untouched_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    started(path).step(logged_step(10))
    inode = path.stat().st_ino
    started(path, start_step=10)
    assert path.stat().st_ino == inode


def test_resume_names_a_damaged_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    started(path).step(logged_step(10))
    path.write_bytes(b"\0\0\0\n[1]\n" + path.read_bytes())
    started(path, start_step=10)
    assert [line["step"] for line in lines(path)] == [10]
    assert [f"{path}:{n} is not a line" in record.message for n, record in enumerate(caplog.records, 1)] == [True, True]


def test_resume_replaces_the_file_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = started(path)
    for step in (10, 20):
        sink.step(logged_step(step))
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        started(path, start_step=10)
    assert path.read_bytes() == before


def test_a_new_run_does_not_lose_the_lines_of_an_earlier_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        sink = started(path)
        sink.step(logged_step(step))
        sink.end(None)  # type: ignore[arg-type]
    steps = {entry.name: lines(entry)[0]["step"] for entry in tmp_path.iterdir()}
    assert steps == {"metrics.1.jsonl": 1, "metrics.2.jsonl": 2, "metrics.jsonl": 3}
    assert "moved to metrics.2.jsonl" in caplog.text


def test_extra_may_not_hide_a_key(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="loss"):
        started(tmp_path / "metrics.jsonl").step(logged_step(extra={"loss": 1.0}))


def test_a_full_disk_leaves_whole_lines_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = started(path)
    sink.step(logged_step(1))
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        sink.step(logged_step(2))
        assert [line["step"] for line in lines(path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert str(path) in caplog.text
    sink.step(logged_step(3))
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        started(path).step(logged_step(1))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert lines(path)[0]["step"] == 1
