"""`python -m estimation`: what it prints, for every config of the project, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estimation.__main__ import main
from estimation.devices import NAMES

FOLDER = Path(__file__).parents[2] / "train_configs"
ONE_MICRO_BATCH = ("--training.global_batch_size=-1", "--training.local_batch_size=1")
"""Which makes them quick, where layers are not equal."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
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
        (("--parallelism.pipeline_parallel_degree=2",), ("pipeline_parallel_degree", "not available")),
    ],
)
def test_refused(arguments: tuple[str, ...], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([str(FOLDER / "debug.toml"), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error


def test_what_is_not_there_yet(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(FOLDER / "debug.toml"), "--gpus", "8"])
    assert stopped.value.code == 2
    assert "not available yet" in capsys.readouterr().err
