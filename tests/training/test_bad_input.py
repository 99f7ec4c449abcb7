"""What a run refuses: it names the key or the file, raises ConfigError (exit code 2), and leaves the folder alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.test_resume import SHORT, config, run_trainer  # noqa: F401  (config is a fixture)
from titan_lite.config.errors import ConfigError
from titan_lite.run.lock import LOCK, RunLock

GO_ON = "--training.steps=6"


def content(folder: Path) -> dict[Path, bytes]:
    """Every file but the lock, which names the last process that held it."""
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names if name != LOCK]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def refused(config: Path, folder: Path, *overrides: str) -> str:  # noqa: F811
    """The message of a run that is refused and changes nothing in its folder."""
    before = content(folder)
    with pytest.raises(ConfigError) as caught:
        run_trainer(config, folder, *SHORT, *overrides)
    assert content(folder) == before
    return str(caught.value)


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The dump folder of a run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_trainer(config, folder, *SHORT, "--checkpoint.interval=2", "--training.steps=4") == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` to go on from."""
    return shutil.copytree(trained, tmp_path / "dump")


# ---- a folder of another run


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--model.dim=64", "model.dim"),
        ("--model.n_layers=3", "model.n_layers"),
        ("--model.attention.n_kv_heads=4", "model.attention.n_kv_heads"),
        ("--model.norm.eps=1e-3", "model.norm.eps"),
        ("--data.held_out=0.2", "data"),
        ("--data.shuffle=false", "data"),
        ("--debug.seed=1", "debug.seed"),
        ("--training.global_batch_size=16", "training.global_batch_size"),
        ("--training.dtype=bfloat16", "metadata.json"),
        ("--checkpoint.load_step=3", "checkpoint.load_step"),
        ("--checkpoint.exclude_from_loading=optimiser", "checkpoint.exclude_from_loading"),
    ],
)
def test_going_on_as_another_run_is_refused(config: Path, trained: Path, override: str, named: str):  # noqa: F811
    extra = ["--training.mixed_precision_param=auto"] if "dtype" in override else []
    assert named in refused(config, trained, GO_ON, override, *extra)


def test_going_back_is_refused_before_later_steps_are_retired(config: Path, folder: Path):  # noqa: F811
    refused(config, folder, GO_ON, "--checkpoint.load_step=2", "--training.global_batch_size=16")


def test_another_process_in_the_folder_is_refused(config: Path, folder: Path):  # noqa: F811
    with RunLock(folder):
        assert str(folder) in refused(config, folder, GO_ON)


# ---- damaged checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "train_state.json", "shard-00000.safetensors"])
def test_a_damaged_checkpoint_is_named_with_an_older_one(
    config: Path,  # noqa: F811
    folder: Path,
    name: str,
    damage: Callable[[Path], None],
):
    path = folder / "checkpoint" / "step-4" / name
    damage(path)
    text = refused(config, folder, GO_ON)
    assert str(path) in text
    assert "--checkpoint.load_step=2" in text


def test_the_older_checkpoint_is_loaded_as_the_message_says(config: Path, folder: Path):  # noqa: F811
    cut(folder / "checkpoint" / "step-4" / "shard-00000.safetensors")
    assert run_trainer(config, folder, *SHORT, "--training.steps=4", "--checkpoint.load_step=2") == 0
    assert run_trainer(config, folder, *SHORT, "--training.steps=4") == 0


# ---- starting from another run


def test_a_start_from_another_model_names_its_tensors(config: Path, trained: Path, tmp_path: Path):  # noqa: F811
    text = refused(config, tmp_path, f"--checkpoint.initial_load_path={trained}", "--model.dim=64")
    assert '\n    21 tensors have another shape in the checkpoint:\n      "model.embedding.weight": [256, 32]' in text


def test_a_start_from_a_folder_without_checkpoint_is_refused(config: Path, tmp_path: Path):  # noqa: F811
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(config, tmp_path / "dump", f"--checkpoint.initial_load_path={empty}")


def test_a_whole_start_keeps_the_global_batch(config: Path, trained: Path, tmp_path: Path):  # noqa: F811
    whole = (f"--checkpoint.initial_load_path={trained}", "--checkpoint.initial_load_model_only=false")
    assert "training.global_batch_size" in refused(config, tmp_path, *whole, "--training.global_batch_size=16")


def test_the_data_can_start_again(config: Path, folder: Path):  # noqa: F811
    assert run_trainer(config, folder, *SHORT, GO_ON, "--checkpoint.exclude_from_loading=dataloader") == 0


# ---- data and vocabulary


def test_a_source_without_documents_is_named(config: Path, tmp_path: Path):  # noqa: F811
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"text": ""}) + "\n")
    text = refused(config, tmp_path / "dump", f"--data.source.path={empty}")
    assert "data.source" in text
    assert str(empty) in text


def test_a_held_out_share_without_documents_is_named(config: Path, tmp_path: Path):  # noqa: F811
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "the only document"}) + "\n")
    with pytest.raises(ConfigError, match=r"data\.held_out"):
        run_trainer(config, tmp_path / "dump", *SHORT, f"--data.source.path={one}", "--validation.enable")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_is_named(config: Path, tmp_path: Path, workers: int):  # noqa: F811
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": "good"}) + "\n" for _ in range(20)) + "{bad\n")
    overrides = (f"--data.source.path={path}", f"--training.dataloader.num_workers={workers}")
    with pytest.raises(ConfigError, match=f"{path}, line 21: not valid JSON"):
        run_trainer(config, tmp_path / "dump", *SHORT, *overrides)


def test_fewer_documents_than_lanes_and_shorter_than_a_row_train(config: Path, tmp_path: Path):  # noqa: F811
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"short {i}"}) + "\n" for i in range(3)))
    overrides = (f"--data.source.path={path}", "--data.held_out=0", "--training.seq_len=100", "--training.steps=2")
    assert run_trainer(config, tmp_path / "dump", *SHORT, *overrides) == 0


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(config: Path, tmp_path: Path):  # noqa: F811
    text = refused(config, tmp_path, "--model.vocab_size=100")
    assert "model.vocab_size = 100" in text
    assert "256" in text


# ---- files and folders


def test_a_dump_folder_that_cannot_be_is_named(config: Path, tmp_path: Path):  # noqa: F811
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert f'job.dump_folder = "{str(folder)[:60]}' in refused(config, folder)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("key", ["metrics.save_tb_folder", "profiling.save_traces_folder"])
@pytest.mark.parametrize("outside", ["/tmp/elsewhere", "../elsewhere"])
def test_what_a_run_writes_stays_inside_its_folder(config: Path, tmp_path: Path, key: str, outside: str):  # noqa: F811
    assert f"{key} = " in refused(config, tmp_path, f"--{key}={outside}")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (f"--debug.seed={2**64}", "debug.seed"),
        (f"--generation.seed={2**64}", "generation.seed"),
        ("--generation.prompts=\udce9", "UTF-8"),
        ("--compile.backend=inducter", "compile.backend"),
    ],
)
def test_values_no_run_could_use_are_refused_at_once(config: Path, tmp_path: Path, override: str, named: str):  # noqa: F811
    assert named in refused(config, tmp_path, "--compile.enable", override)
