"""One process: what is loaded is what was saved, bit for bit, and other tools can open the files."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.helpers import FACTS, STATE, forked, make_manager, make_tensors, same_bits, zeros_like
from tests.runs import tiny_job
from titan_lite.checkpoint import reader
from titan_lite.checkpoint.facts import RunFacts
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.shard import DTYPE_CODES
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import to_toml


def every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"model.{code}": (torch.randn(3, 7) * 3).to(dtype) for dtype, code in DTYPE_CODES.items()}
    return tensors | {
        "model.scalar": torch.tensor(2.5),
        "model.empty": torch.empty(0, 4),
        "model.nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "model.transposed": torch.randn(6, 4).t(),
        "model.parameter": torch.nn.Parameter(torch.randn(4, 4)),
        "model.weird name/\"'\n": torch.randn(2),
    }


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_kind()
    make_manager(tmp_path).save(1, tensors, STATE)
    loaded = zeros_like(tensors)
    loaded["model.parameter"] = torch.nn.Parameter(torch.zeros(4, 4))
    target = loaded["model.parameter"]
    manager = make_manager(tmp_path)
    start = manager.start()
    assert start is not None
    assert manager.load(start, loaded) == STATE
    assert same_bits(loaded, tensors)
    assert loaded["model.parameter"] is target  # in place


def test_targets_of_any_stride_are_filled_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"model.a": torch.randn(50, 6, 4), "model.b": torch.randn(1000)}
    make_manager(tmp_path).save(1, tensors, {})
    monkeypatch.setattr(reader, "BLOCK", 64)  # less than a row of `a` (96 bytes), several blocks of `b`
    loaded = {"model.a": torch.zeros(4, 6, 50).permute(2, 1, 0), "model.b": torch.zeros(1000, 2)[:, 0]}
    restore(tmp_path / "checkpoint" / "step-1", loaded)
    assert same_bits(loaded, tensors)


def test_safetensors_library_reads_the_shards(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in every_kind().items() if "F8" not in name}
    make_manager(tmp_path).save(7, tensors, STATE)
    with safe_open(tmp_path / "checkpoint/step-7/shard-00000.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
        assert same_bits({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118 - not a dict


def test_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    manager = make_manager(tmp_path)
    manager.save(10, make_tensors(), STATE)
    manager.save(20, make_tensors(1), STATE)
    folder = tmp_path / "checkpoint" / "step-20"
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.parent_step, manifest.run_id) == (20, 10, manager.run_id)
    assert (manifest.config, manifest.tokenizer, manifest.data) == (FACTS.config, "t0", "d0")
    assert (manifest.model.tensors, manifest.model.parameters, manifest.world_size) == (2, 54, 1)
    assert manifest.versions["torch"] == torch.__version__
    assert {name: file.size for name, file in manifest.files.items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"
    }
    assert json.loads((folder / "train_state.json").read_text()) == STATE
    other = make_manager(tmp_path)
    start = other.start()
    assert start is not None
    other.load(start, make_tensors())
    assert (other.run_id, other.parent) == (manager.run_id, 20)  # the same run goes on


def test_a_load_unpickles_nothing(tmp_path: Path) -> None:
    tensors = make_tensors()
    make_manager(tmp_path).save(1, tensors, STATE)

    def load_watched() -> None:
        seen: list[str] = []
        sys.addaudithook(lambda event, _: seen.append(event) if event in ("pickle.find_class", "exec") else None)
        import pickle

        pickle.loads(pickle.dumps(Path()))
        assert "pickle.find_class" in seen  # the hook does see one
        seen.clear()
        loaded = zeros_like(tensors)
        manager = make_manager(tmp_path)
        start = manager.start()
        assert start is not None
        manager.load(start, loaded)
        assert same_bits(loaded, tensors)
        assert "pickle.find_class" not in seen

    assert forked(load_watched) == 0


def test_differences_are_all_reported_by_name(tmp_path: Path) -> None:
    saved = make_tensors()
    make_manager(tmp_path).save(1, saved, STATE)
    wanted = zeros_like(saved)
    del wanted["optim.b.step"]
    wanted["model.w"] = torch.zeros(9, 6)
    wanted["model.b"] = torch.zeros(9)
    wanted["model.new"] = torch.zeros(1)
    manager = make_manager(tmp_path)
    start = manager.start()
    assert start is not None
    with pytest.raises(ConfigError) as error:
        manager.load(start, wanted)
    text = str(error.value)
    for part in (
        "lacks 1 tensors of this run",
        "exclude_from_loading = ",
        '"model.new"',
        '"model.w": [9, 5], this run [9, 6]',
        '"model.b": bfloat16, this run float32',
        "that this run does not",
        '"optim.b.step"',
    ):
        assert part in text, text
    assert not any(tensor.any() for tensor in wanted.values())  # nothing was touched


def test_an_unsupported_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model\.z: a checkpoint cannot hold torch\.complex64"):
        make_manager(tmp_path).save(1, {"model.z": torch.zeros(2, dtype=torch.complex64)}, {})


def test_files_are_only_readable_by_their_names_in_the_folder(tmp_path: Path) -> None:
    make_manager(tmp_path).save(1, make_tensors(), STATE)
    shard = tmp_path / "checkpoint/step-1/shard-00000.safetensors"
    moved = tmp_path / "elsewhere"
    os.rename(shard, moved)
    shard.symlink_to(moved)
    with pytest.raises(ConfigError, match=r"shard-00000\.safetensors\n.*cannot be read"):
        restore(shard.parent, make_tensors())


def test_a_checkpoint_of_a_version_with_fewer_keys_goes_on(tmp_path: Path) -> None:
    """Its config and its model lack what came later; other keys still make another model."""
    job = tiny_job()
    older = job.model.identity()
    del older["head"]["reward"]
    config = re.sub(r"\[model\.head\.reward\]\ntype = \"none\"\n", "", to_toml(job))
    assert config != to_toml(job)
    make_manager(tmp_path, facts=RunFacts(config, older)).save(10, make_tensors(), STATE)
    now = RunFacts(to_toml(job), job.model.identity())
    manager = make_manager(tmp_path, facts=now)
    start = manager.start()
    assert start is not None
    assert manager.load(start, zeros_like(make_tensors())) == STATE
    wider = tiny_job(model={"dim": 48})
    other = make_manager(tmp_path, facts=RunFacts(to_toml(wider), wider.model.identity()))
    with pytest.raises(ConfigError, match=r"model.dim\n.*there it is 32, here 48"):
        other.load(start, zeros_like(make_tensors()))
