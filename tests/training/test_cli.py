"""The commands as users type them: what they print, what they leave alone, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_resume import SHORT, config, run_trainer  # noqa: F401  (config is a fixture)
from titan_lite.run.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
BAD_INPUT = 2


def command(*arguments: str | bytes | Path) -> subprocess.CompletedProcess[bytes]:
    """Runs a Python command in the checkout, with the bytes of its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NGPU": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, timeout=120)


def refused(result: subprocess.CompletedProcess[bytes]) -> str:
    """The message of a command that ended with code 2 and no traceback."""
    text = (result.stdout + result.stderr).decode(errors="backslashreplace")
    assert result.returncode == BAD_INPUT, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The dump folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_trainer(config, folder, "--training.steps=2", *SHORT) == 0
    return folder


def test_the_launcher_tells_all_problems_before_it_starts_anything(config: Path, tmp_path: Path):  # noqa: F811
    folder = tmp_path / "dump"
    text = refused(
        command(
            "-m",
            "titan_lite.launch",
            config,
            f"--job.dump_folder={folder}",
            "--training.stepz=3",
            "--model.attention.n_heads=5",
            "--data.source.path=/no/such",
        )
    )
    assert "training.stepz" in text
    assert "did you mean `steps`?" in text
    assert "model.attention.n_heads = 5" in text
    assert "/no/such" in text
    assert not folder.exists()


def test_a_second_run_in_the_folder_is_refused_through_the_launcher(config: Path, trained: Path):  # noqa: F811
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with RunLock(trained):
        result = command(
            "-m", "titan_lite.launch", config, f"--job.dump_folder={trained}", "--training.steps=4", *SHORT
        )
        text = refused(result)
    assert "job.dump_folder" in text
    assert str(trained) in text
    assert f"pid {os.getpid()}" in text
    lock = trained / "run.lock"
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert {**after, lock: b""} == {**before, lock: b""}


def test_check_config_lists_problems_as_json(config: Path):  # noqa: F811
    result = command("scripts/check_config.py", config, "--json", "--optimizer.lr=-1.0", "--model.n_layers=x")
    assert result.returncode == BAD_INPUT
    keys = {problem["key"] for problem in json.loads(result.stdout)["problems"]}
    assert keys == {"optimizer.lr", "model.n_layers"}


def test_a_sample_continues_any_prompt(trained: Path):
    result = command("scripts/generate.py", trained, "--prompt", "Grüße 日本", "--max-new-tokens", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Grüße 日本".encode())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--prompt", b"\xe9"), "--prompt"),
        (("--prompt", "x", "--seed", str(2**64)), "--seed"),
        (("--prompt", "x", "--temperature", "nan"), "--temperature"),
    ],
    ids=["prompt that is no text", "seed too large", "temperature"],
)
def test_generation_names_the_bad_option(trained: Path, arguments: tuple[str | bytes, ...], named: str):
    assert named in refused(command("scripts/generate.py", trained, *arguments))
