"""Settings without effect are said in a line each; what this machine lacks is refused before the run starts."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.optim.schedule import LRScheduler


@pytest.fixture(params=[False, True])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the machine has CUDA devices."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8 if request.param else 0)
    return request.param


CUT_WARMUP = "lr_scheduler.warmup_steps = 20 is cut to {} = 10"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmup_steps": 10}, ()),
        ({"warmup_steps": 20}, (CUT_WARMUP.format("training.steps"),)),
        ({"warmup_steps": 20, "total_steps": 10}, (CUT_WARMUP.format("lr_scheduler.total_steps"),)),
        ({"warmup_steps": 20, "total_steps": 20}, ()),
        ({"warmup_steps": 6, "decay_ratio": 0.4}, ()),
        (
            {"warmup_steps": 6, "decay_ratio": 0.5},
            ("lr_scheduler.decay_ratio = 0.5 is 5 of 10 steps, cut to the 4 that the warm-up leaves",),
        ),
    ],
)
def test_what_the_schedule_cuts_is_said(schedule: dict[str, Any], expected: tuple[str, ...]) -> None:
    job = job_from_dict({"training": {"steps": 10}, "lr_scheduler": schedule})
    assert job.warnings == expected
    asked = (schedule["warmup_steps"], round(10 * schedule.get("decay_ratio", 0)))
    made: LRScheduler = job.lr_scheduler.build(10)
    assert bool(expected) == (made.warmup < asked[0] or made.decay < asked[1])


def test_deterministic_warn_only_alone_is_said() -> None:
    for deterministic in (True, False):
        debug = {"deterministic": deterministic, "deterministic_warn_only": True}
        warnings = job_from_dict({"debug": debug}).warnings
        said = "debug.deterministic_warn_only has no effect: debug.deterministic is false"
        assert warnings == (() if deterministic else (said,))


@pytest.mark.parametrize(
    "key",
    [
        "training.enable_cpu_offload",
        "training.enable_optimizer_offload",
        "training.dataloader.pin_memory",
        "activation_checkpoint.offload",
    ],
)
def test_what_only_cuda_makes_use_of_is_said(cuda: bool, key: str) -> None:
    *tables, last = key.split(".")
    nested: dict[str, Any] = {last: True}
    for table in reversed(tables):
        nested = {table: nested}
    said = f"{key} has no effect: there is no CUDA device on this machine"
    assert job_from_dict(nested).warnings == (() if cuda else (said,))


def test_persistent_workers_are_said_with_their_table() -> None:
    job = job_from_dict({"validation": {"dataloader": {"num_workers": 1, "persistent_workers": True}}})
    assert [line.split(" has no effect")[0] for line in job.warnings] == ["validation.dataloader.persistent_workers"]


def problems(tables: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        job_from_dict(tables)
    except ConfigError as error:
        return [(p.code, p.key) for p in error.problems]
    return []


def test_memory_snapshots_need_cuda(cuda: bool) -> None:
    tables = {"profiling": {"enable_memory_snapshot": True}}
    assert problems(tables) == ([] if cuda else [("E014", "profiling.enable_memory_snapshot")])
    job_from_dict(tables, files=False)  # what this machine lacks does not matter to an estimate


def test_weights_and_biases_must_be_installed(tmp_path, monkeypatch) -> None:
    tables = {"metrics": {"enable_wandb": True}}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p == str(tmp_path)])
    assert problems(tables) == [("E014", "metrics.enable_wandb")]
    with pytest.raises(ConfigError, match=r"titan_lite\[wandb\]"):
        job_from_dict(tables)
    job_from_dict(tables, files=False)
    (tmp_path / "wandb").mkdir()  # as its runs leave behind
    assert problems(tables) == [("E014", "metrics.enable_wandb")]
    (tmp_path / "wandb" / "__init__.py").touch()
    assert problems(tables) == []
