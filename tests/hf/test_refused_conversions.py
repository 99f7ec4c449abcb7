"""Bad input: a message that names the file or the tensor, and no folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import convert_from_hf, convert_to_hf
from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.config.errors import ConfigError
from titan_lite.hf.errors import ConversionError
from titan_lite.hf.export import export
from titan_lite.hf.importer import import_folder
from titan_lite.hf.rule import Rule, times


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("run"), model_tables("llama3"))


@pytest.fixture(scope="module")
def good(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several files."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    export(dump, folder, verified=False, shard_size=200_000)
    return folder


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


FILE = "model-00002-of-"


def second(folder: Path) -> Path:
    return next(folder.glob(f"{FILE}*"))


def cut(folder: Path) -> None:
    path = second(folder)
    path.write_bytes(path.read_bytes()[:-100])


def no_header(folder: Path) -> None:
    second(folder).write_bytes(struct.pack("<Q", 2**40) + b"{}")


def garbage(folder: Path) -> None:
    second(folder).write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json at all!")


def overlapping(folder: Path) -> None:
    path = second(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    name = next(name for name in table if name != "__metadata__")
    table[name]["data_offsets"][0] += 4
    head = json.dumps(table).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])


def gone(folder: Path) -> None:
    second(folder).unlink()


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(second(folder))
    change(tensors)
    save_file(tensors, second(folder), {"format": "pt"})


def without_a_tensor(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.__delitem__(sorted(tensors)[0]))


def unknown_to_all(folder: Path) -> None:
    name = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    edit(folder / "model.safetensors.index.json", lambda table: table["weight_map"].__delitem__(sorted(name)[-1]))


def of_another_shape(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(intermediate_size=config["intermediate_size"] * 2))


def only_pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def config_key(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config.update(values))


def cut_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:50])


def not_a_number(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[0]].view(-1)[3] = float("nan")

    changed(folder, change)


def in_float8(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}))


def whole_numbers(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({n: t.to(torch.int32) for n, t in tensors.items()}))


def one_too_many(folder: Path) -> None:
    (name,) = [file.name for file in folder.glob(f"{FILE}*")]
    changed(folder, lambda tensors: tensors.update({"model.layers.0.mlp.surplus": torch.zeros(2)}))
    index = folder / "model.safetensors.index.json"
    edit(index, lambda table: table["weight_map"].update({"model.layers.0.mlp.surplus": name}))


def outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    edit(index, lambda table: table["weight_map"].update({"lm_head.weight": f"../{second(folder).name}"}))


def a_folder_as_file(folder: Path) -> None:
    path = second(folder)
    path.unlink()
    path.mkdir()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])


def no_table(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, rf"{FILE}.*\n.*header is damaged: the tensors take \d+ bytes"),
    "no header": (no_header, rf"{FILE}.*\n.*is no safetensors file, or was cut off"),
    "garbage": (garbage, rf"{FILE}.*\n.*header is damaged"),
    "overlapping": (overlapping, rf"{FILE}.*\n.*begins at byte"),
    "a file is gone": (gone, rf"{FILE}.*\n.*the file is missing"),
    "a tensor is gone": (without_a_tensor, rf"{FILE}.*\n.*(model|lm_head)\.\S+ is not in it"),
    "not in the index": (unknown_to_all, r"model-\d+-of-.*\n.*model\.\S+ is in it, and .* does not say so"),
    "another shape": (of_another_shape, r"another shape than its model:\n.*model\.layers\.0\.mlp"),
    "pickled": (only_pickled, r"pytorch_model.bin is a pickle, which is never read"),
    "another kind of model": (
        config_key(model_type="bert"),
        r'config.json\n.*"bert" is not known here\n.*allowed: .*llama',
    ),
    "no config": (cut_config, r"config.json\n.*is not valid JSON"),
    "quantized": (
        config_key(quantization_config={"bits": 4}),
        r"config.json\n.*is quantized in a way that is not read",
    ),
    "blocks of no size": (
        config_key(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}),
        r"config.json\n.*is quantized in a way that is not read",
    ),
    "no numbers": (not_a_number, rf"{FILE}.*\n    lm_head.weight holds values that are no finite numbers"),
    "float8 that config.json is silent of": (
        in_float8,
        r"are in no floating-point type of a model:\n *lm_head.weight: torch.float8_e4m3fn",
    ),
    "whole numbers": (whole_numbers, r"in no floating-point type of a model:\n *lm_head.weight: torch.int32"),
    "a tensor too many": (one_too_many, r"has 1 tensors that its model does not:\n *model\.layers\.0\.mlp\.surplus"),
    "a file elsewhere": (outside, r'lm_head.weight in "?.?\.\./model\S+, which is no safetensors file of this folder'),
    "a folder for a file": (a_folder_as_file, rf"{FILE}.*\n.*cannot be read: Is a directory"),
    "a word for a number": (
        config_key(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        r"config.json\n.*is no config of a llama model: could not convert string to float: 'x'",
    ),
    "an activation of their own": (config_key(hidden_act="mish"), r"config.json  hidden_act"),
    "one layer more": (config_key(num_hidden_layers=3), r"lacks 9 tensors of the model:\n.*model.layers.2"),
    "one layer less": (config_key(num_hidden_layers=1), r"has 9 tensors that its model does not:\n.*model.layers.1"),
    "a tokenizer that is cut": (cut_tokenizer, r'hf/tokenizer.json"\n    is not a tokenizer.json: .*EOF'),
    "a tokenizer's config that is none": (no_table, r"tokenizer_config.json beside it does not hold a table"),
    "no tokenizer": (no_tokenizer, r"has no tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    damage(copied(good, tmp_path / "hf"))
    with pytest.raises(ConfigError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_damaged_checkpoint_is_refused(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = copied(dump / "checkpoint" / "step-7", tmp_path / "step-7")
    shard = step / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit, match="2"):
        convert_to_hf.main([str(step), str(tmp_path / "out")])
    assert "shard-00000.safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-7"]


def test_what_no_float16_can_be_is_refused(tmp_path: Path) -> None:
    dump = save_random(tmp_path / "run", model_tables("llama3"), std=1e5)
    with pytest.raises(ConfigError, match=r"model\.\S+\n.*has values that no float16 can be"):
        export(dump, tmp_path / "out", dtype="float16", verified=False)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_numbers_is_refused(tmp_path: Path) -> None:
    dump = save_random(tmp_path / "run", model_tables("llama3"), std=float("nan"))
    with pytest.raises(ConfigError, match=r"model.embedding.weight\n    holds values that are no finite numbers"):
        export(dump, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(dump: Path, good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for convert in (lambda: export(dump, tmp_path / "out"), lambda: import_folder(good, tmp_path / "out")):
        with pytest.raises(ConfigError, match="exists already, and nothing is overwritten"):
            convert()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("method", "dtype"), [("whole", ""), ("by_block", ""), ("whole", "bfloat16")])
def test_weights_that_are_written_otherwise_leave_no_folder(
    method: str, dtype: str, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bit of one number, which no logit tells."""
    from titan_lite.hf import export as module

    right = module.write_shards

    def flipped(folder: Path, *given: Any) -> Any:
        written = right(folder, *given)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
        return written

    monkeypatch.setattr(module, "write_shards", flipped)
    with pytest.raises(ConversionError, match=r"1 tensors are not what the checkpoint makes, such as \S+\.weight"):
        export(dump, tmp_path / "out", dtype, method=method)
    assert [left.name for left in tmp_path.iterdir()] == ["out.conversion_report.json"]


def test_a_wrong_conversion_leaves_no_folder(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from titan_lite.hf.llama import LlamaLike

    right = LlamaLike.rules

    def wrong(self: Any, model: Any) -> list[Rule]:
        def enlarged(rule: Rule) -> Rule:
            down = any(name.endswith("ffn.down.weight") for name in rule.ours)
            return Rule(rule.ours, rule.theirs, times(1.01)) if down else rule

        return [enlarged(rule) for rule in right(self, model)]

    monkeypatch.setattr(LlamaLike, "rules", wrong)
    with pytest.raises(ConversionError, match="logits differ by up to"):
        export(dump, tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert left.name == "out.conversion_report.json"
    assert json.loads(left.read_text())["verified"]["max_logit_difference"] > 1e-4
    assert convert_to_hf.main([str(dump), str(tmp_path / "out")]) == 1
    assert "was not made" in capsys.readouterr().err


def test_what_a_killed_conversion_left_is_removed(dump: Path, tmp_path: Path) -> None:
    left, held, other = (tmp_path / f".{name}" for name in ("out.tmp-0", "out.tmp-1", "another.tmp-0"))
    for folder in (left, held, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as by a conversion that is running
    export(dump, tmp_path / "out", verified=False)
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".another.tmp-0", ".out.tmp-1", "out"]


def test_a_full_disk_is_told_before_weights_are_written(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_lite.hf.export.free_bytes", lambda path: 2**20)
    with pytest.raises(ConversionError, match=r"has 1.0 MiB left, and the weights need \S+ MiB"):
        export(dump, tmp_path / "out", verified=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_meanwhile(dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(ConversionError, match=r"was not made: .*No space left on device"):
        export(dump, tmp_path / "out", verified=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_at_last(dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights become durable in a thread, whose error counts."""
    right = os.fsync

    def failing(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        right(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ConversionError, match=r"was not made: .*Input/output error"):
        export(dump, tmp_path / "out", verified=False, shard_size=200_000)
    assert list(tmp_path.iterdir()) == []


def test_scripts_end_with_their_codes(
    dump: Path, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_to_hf.main([str(dump), str(tmp_path / "hf"), "--no-verify", "--max-shard-size", "1MB"]) == 0
    assert "LlamaForCausalLM of step 7, float32, not verified" in capsys.readouterr().out
    assert convert_from_hf.main([str(good), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "checkpoint" / "step-0" / "manifest.json").is_file()
    with pytest.raises(SystemExit, match="2"):
        convert_to_hf.main([str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        convert_from_hf.main([str(tmp_path / "nothing"), str(tmp_path / "out")])
