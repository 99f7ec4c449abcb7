"""TensorBoard files read back with TensorBoard's own reader; Weights & Biases against a stand-in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.run.facts import logged_step, logged_validation, run_facts
from titan_lite.config.errors import ConfigError
from titan_lite.run.device import Memory
from titan_lite.run.sink import Totals
from titan_lite.run.tracking import TensorBoard, WeightsAndBiases, step_scalars

TOTALS = Totals("completed", 1, 1, 1.0, 1.0, None, None)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_has_torchtitans_names(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path / "tb")
    sink.start(run_facts(tmp_path))
    memory = Memory(2.0, 8.0, active_gib=1.0, alloc_retries=0, ooms=0)
    sink.step(logged_step(10, mfu=0.25, memory=memory, extra={"z_loss": 0.5}))
    sink.validation(logged_validation(10))
    read = curves(tmp_path / "tb")  # before the end: flushed
    sink.end(TOTALS)
    assert {tag: points[0][1] for tag, points in read.items()} == pytest.approx(
        {
            "loss_metrics/global_avg_loss": 4.7215,
            "grad_norm": 0.28041,
            "lr": 8e-4,
            "n_tokens_seen": 10_000,
            "throughput(tps)": 5847.4,
            "tflops": 0.1234,
            "mfu(%)": 25.0,
            "time_metrics/end_to_end(s)": 0.5,
            "time_metrics/data_loading(s)": 0.0625,
            "time_metrics/data_loading(%)": 12.5,
            "memory/max_reserved(GiB)": 2.0,
            "memory/max_reserved(%)": 25.0,
            "memory/max_active(GiB)": 1.0,
            "memory/max_active(%)": 12.5,
            "memory/num_alloc_retries": 0,
            "memory/num_ooms": 0,
            "z_loss": 0.5,
            "validation_metrics/loss": 2.123456,
            "validation_metrics/bits_per_byte": 3.0635,
            "validation_metrics/throughput(tps)": 12_345.6,
            "validation_metrics/memory/max_reserved(GiB)": 1.234,
            "validation_metrics/memory/max_reserved(%)": 100 * 1.234 / 24.1,
        }
    )
    assert {points[0][0] for points in read.values()} == {10}


def test_a_resumed_run_hides_later_points(tmp_path: Path) -> None:
    for start, steps in ((0, (10, 20, 30)), (10, (20, 30, 40))):
        sink = TensorBoard(tmp_path)
        sink.start(run_facts(tmp_path, start_step=start))
        for step in steps:
            sink.step(logged_step(step, loss=float(start)))
        sink.end(TOTALS)
    assert curves(tmp_path)["loss_metrics/global_avg_loss"] == [(10, 0), (20, 10), (30, 10), (40, 10)]


def test_unknown_numbers_have_no_scalar() -> None:
    assert not {"mfu(%)", "memory/max_active(GiB)", "memory/num_ooms"} & step_scalars(logged_step()).keys()


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys, titan_lite.run.observe\n"
        "print(*[name for name in ('tensorboard', 'wandb', 'torch.utils.tensorboard') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "\n"


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics\.enable_wandb(.|\n)*titan_lite\[wandb\]"):
        WeightsAndBiases(tmp_path, {})


def test_wandb_gets_the_config_the_id_and_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeRun:
        def log(self, scalars: dict[str, float], step: int) -> None:
            calls.append((scalars, step))

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    fake = ModuleType("wandb")
    fake.init = lambda **settings: calls.append(settings) or FakeRun()  # type: ignore[attr-defined,func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    sink = WeightsAndBiases(tmp_path / "tb", {"training": {"steps": 3}}, "-rank_1")
    sink.start(run_facts(tmp_path, run_id="abc"))
    sink.step(logged_step(10))
    sink.end(TOTALS)
    settings, logged, exit_code = calls
    assert settings == {
        "dir": str(tmp_path / "tb"),
        "config": {"training": {"steps": 3}},
        "id": "abc-rank_1",
        "resume": "allow",
    }
    assert logged == (step_scalars(logged_step(10)), 10)
    assert exit_code == 0
