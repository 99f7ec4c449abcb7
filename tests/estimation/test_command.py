"""`python -m estimation`: what it prints, for every config of the project, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from estimation.__main__ import main
from estimation.compute import Assumptions, compute_of
from estimation.devices import NAMES, device_of
from estimation.estimate import estimate
from estimation.memory import memory_of
from estimation.rehearsal import rehearse
from titan_lite.config.load import job_from_dict

FOLDER = Path(__file__).parents[2] / "train_configs"
ONE_MICRO_BATCH = ("--training.global_batch_size=-1", "--training.local_batch_size=1")
"""Which makes them quick, where layers are not equal."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json", "--no-advice"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_estimated(path: Path, capsys: pytest.CaptureFixture[str]):
    found = printed(capsys, str(path), *ONE_MICRO_BATCH)
    assert found["fits"] is (found["spare_gib"] >= 0)
    assert not found["peak_is_upper_bound"]
    assert 0 < found["peak_live_gib"] <= found["peak_reserved_gib"]
    assert sum(found["categories"].values()) == pytest.approx(found["peak_live_gib"])
    assert found["step_seconds"] > 0
    assert 0 < found["mfu"] < 1
    assert found["tokens_per_second_per_device"] > 0
    assert found["flops_per_token"] > 0.9 * found["formula_flops_per_token"]
    assert found["assumptions"]["matmul_efficiency"] > 0
    assert found["not_modelled"]


def test_state_at_rest_is_that_of_the_formula(capsys: pytest.CaptureFixture[str]):
    """8B over 8 ranks: 4 bytes of each parameter, and twice that for Adam."""
    found = printed(capsys, str(FOLDER / "llama3_8b.toml"), "--world-size", "8", "--training.seq_len=256")
    categories = found["categories"]
    assert found["parameters"] == 8_030_261_248
    share = found["parameters"] / 8 * 4 / 2**30
    assert categories["parameters"] == pytest.approx(share, rel=1e-3)
    assert categories["optimizer state"] == pytest.approx(2 * share, rel=1e-3)
    assert found["layers_traced"] < found["layers"]


def test_every_rank_of_a_pipeline(capsys: pytest.CaptureFixture[str]):
    """The numbers are those of the fullest; the time has the bubble of four micro-batches on two ranks in it."""
    layout = ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4", "--training.seq_len=32")
    found = printed(capsys, str(FOLDER / "debug.toml"), *layout)
    assert found["mesh"]["pp"] == 2
    assert [rank["stages"] for rank in found["pipeline"]] == [[0], [1]]
    assert sum(rank["layers"] for rank in found["pipeline"]) == found["layers"]
    assert found["bubble"] == pytest.approx(1 / 5)
    assert found["step_seconds"] == pytest.approx(max(rank["seconds"] for rank in found["pipeline"]) / (1 - 1 / 5))
    assert found["peak_live_gib"] == max(rank["peak_live_gib"] for rank in found["pipeline"])
    assert found["flops_per_token"] == pytest.approx(found["formula_flops_per_token"], rel=0.1)


def test_a_rank_between_those_that_are_traced():
    """Of equal ones in the middle of a pipeline the ends are traced; the others lie where a trace finds them."""
    model = {"dim": 64, "n_layers": 5, "vocab_size": 512, "attention": {"n_heads": 4}}
    training = {"local_batch_size": 5, "seq_len": 64, "mixed_precision_param": "float32"}
    tables: dict[str, Any] = {"model": model, "training": training, "activation_checkpoint": {"mode": "none"}}
    ends = {f"pipeline_parallel_{end}_stage_less_layers": 0 for end in ("first", "last")}
    tables["parallelism"] = {"pipeline_parallel_degree": 5, **ends}
    job, device = job_from_dict(tables, 5, files=False), device_of("h100-80gb")
    found = estimate(job, 5, device)
    assert any("between 1 and 3" in line for line in found.not_modelled)
    traced = rehearse(job, 5, on_device=True, rank=2)
    assert found.pipeline[2].peak_live == pytest.approx(memory_of(traced.trace).peak.total, rel=1e-3)
    computed = compute_of(traced, device, Assumptions())
    assert found.pipeline[2].seconds == pytest.approx(computed.seconds, rel=1e-3)
    assert found.pipeline[2].flops == computed.flops


def test_a_reader_that_has_enough(monkeypatch: pytest.MonkeyPatch):
    """As `| head -1`: no complaint, and 0."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([str(FOLDER / "debug.toml"), "--training.seq_len=64", *ONE_MICRO_BATCH]) == 0


def test_a_report_for_people(capsys: pytest.CaptureFixture[str]):
    assert main([str(FOLDER / "debug.toml"), "--device", "rtx4090", "--tokens", "1e9", "--assume", "latency_us=3"]) == 0
    text = capsys.readouterr().out
    for words in ("rtx4090", "fits", "parameters", "live", "reserved", "MFU", "device hours", "latency_us=3"):
        assert words in text


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]):
    arguments = (str(FOLDER / "llama3_8b.toml"), "--device", "rtx3090", "--training.seq_len=256")
    assert printed(capsys, *arguments)["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "h1000"), NAMES),
        (("--assume", "speed=2"), ("speed", "matmul_efficiency")),
        (("--assume", "matmul_efficiency=2"), ("out of range",)),
        (("--world-size", "3", "--parallelism.data_parallel_replicate_degree=2"), ("data_parallel_replicate_degree",)),
        (("--model.dim=5",), ("model.dim",)),
        (("--training.nothing=5",), ("training.nothing",)),
        (("--parallelism.pipeline_parallel_degree=8",), ("training.local_batch_size", "pipeline_parallel_degree")),
    ],
)
def test_refused(arguments: tuple[str, ...], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([str(FOLDER / "debug.toml"), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error


def test_a_picture_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "step.png"
    printed(capsys, str(FOLDER / "debug.toml"), "--training.global_batch_size=16", "--plot", str(picture))
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090"])
def test_devices_by_their_makers_names(name: str):
    """Which are those that a run's device tells."""
    expected = {"NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA A100-SXM4-40GB": "a100-40gb"}.get(name, "rtx4090")
    assert device_of(name).name == expected
