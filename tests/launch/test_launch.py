"""The launcher's own part: the config is checked before any process starts; the workers get the user's arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from titan_lite import launch
from titan_lite.launch import Cluster


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Cluster, Path]]:
    """What `run_workers` was called with; signals of the test process stay as they are."""
    calls: list[tuple[list[str], Cluster, Path]] = []

    def run_workers(command: list[str], cluster: Cluster, dump_folder: Path, relay: object) -> int:
        calls.append((command, cluster, dump_folder))
        return 75

    monkeypatch.setattr(launch, "run_workers", run_workers)
    monkeypatch.setattr("titan_lite.relay.SignalRelay.listen", lambda relay: relay)
    monkeypatch.setenv("NGPU", "2")
    return calls


@pytest.mark.parametrize(
    ("text", "overrides", "named"),
    [
        ("[training]\nstepz = 3\n", [], "training.stepz"),
        ("[training]\nsteps = 3\n", ["--training.steps=none"], "training.steps"),
        ("[training\n", [], "bad.toml"),
    ],
)
def test_a_bad_config_starts_nothing(
    text: str, overrides: list[str], named: str, launched: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(text)
    with pytest.raises(SystemExit) as caught:
        launch.main([str(config), *overrides])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert launched == []


def test_a_missing_config_and_a_bad_cluster_start_nothing(
    launched: list, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.main([]) == 2
    with pytest.raises(SystemExit):
        launch.main([str(tmp_path / "missing.toml")])
    assert "missing.toml" in capsys.readouterr().err
    monkeypatch.setenv("NGPU", "many")
    with pytest.raises(SystemExit):
        launch.main([str(tmp_path / "missing.toml")])
    assert "NGPU" in capsys.readouterr().err
    assert launched == []


def test_workers_get_the_users_arguments(launched: list, tmp_path: Path) -> None:
    config = tmp_path / "good.toml"
    config.write_text('[job]\ndump_folder = "elsewhere"\n')
    arguments = [str(config), "--training.steps=3", "--job.dump_folder", str(tmp_path / "out")]
    assert launch.main(arguments) == 75
    ((command, cluster, dump_folder),) = launched
    assert command == [sys.executable, "-u", "-m", "titan_lite.train", *arguments]
    assert (cluster.workers, dump_folder) == (2, tmp_path / "out")
