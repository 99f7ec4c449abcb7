"""Damaged and hostile checkpoints are refused with the name of the file; nothing is loaded from them."""

from __future__ import annotations

import json
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.helpers import STATE, forked, make_manager, make_tensors, zeros_like
from titan_lite.checkpoint import manifest as manifest_module
from titan_lite.checkpoint.manifest import FileSum, manifest_to_json, read_manifest
from titan_lite.checkpoint.restore import restore
from titan_lite.checkpoint.safetensors_file import write_file
from titan_lite.config.errors import ConfigError


@pytest.fixture
def step(tmp_path: Path) -> Path:
    manager = make_manager(tmp_path)
    manager.save(10, make_tensors(), STATE)
    manager.save(20, make_tensors(1), STATE)
    return tmp_path / "checkpoint" / "step-20"


def refused(folder: Path) -> str:
    tensors = zeros_like(make_tensors())
    with pytest.raises(ConfigError) as error:
        restore(folder, tensors)
    assert not any(tensor.any() for tensor in tensors.values())
    return str(error.value)


def test_200_random_flips_and_cuts_are_all_refused_by_name(step: Path) -> None:
    rng = random.Random(0)
    files = sorted(step.iterdir())
    assert len(files) == 4
    for case in range(200):
        path = files[case % 4]
        good = path.read_bytes()
        if case % 5 == 4:
            bad = good[: rng.randrange(len(good))]
        else:
            bit = rng.randrange(8 * len(good))
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        text = refused(step)
        assert str(path) in text, f"case {case}: {text}"
        assert "--checkpoint.load_step=10" in text
        path.write_bytes(good)
    restore(step, make_tensors())


@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "train_state.json", "shard-00000.safetensors"])
def test_a_missing_file_is_named(step: Path, name: str) -> None:
    (step / name).unlink()
    assert re.search(rf"{re.escape(str(step / name))}\n.*the file is missing", refused(step))


def test_a_manifest_that_says_the_same_in_other_bytes_is_refused(step: Path) -> None:
    path = step / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))
    assert "its checksum does not match its content" in refused(step)


def test_appended_bytes_and_sizes_are_told(step: Path) -> None:
    path = step / "train_state.json"
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b" ")
    assert f"the file has {size + 1} bytes, the manifest says {size}" in refused(step)


def forge(step: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Changes metadata.json, makes every checksum right again, as an attacker would, and loads."""
    document = json.loads((step / "metadata.json").read_bytes())
    data = json.dumps(change(document) or document).encode()
    return forge_bytes(step, data)


def forge_bytes(step: Path, data: bytes) -> str:
    (step / "metadata.json").unlink()
    written = write_file(step / "metadata.json", data)
    manifest = read_manifest(step)
    manifest = manifest.model_copy(update={"files": manifest.files | {"metadata.json": written}})
    (step / "manifest.json").write_bytes(manifest_to_json(manifest))
    return refused(step)


def chunk_change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["tensors"]["model.w"]["chunks"][0].update(values)


def tensor_change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["tensors"]["model.w"].update(values)


HOSTILE = {
    "parent folder": chunk_change(file="../step-10/shard-00000.safetensors"),
    "absolute path": chunk_change(file="/etc/passwd"),
    "file not in the manifest": chunk_change(file="shard-00009.safetensors"),
    "file is a number": chunk_change(file=0),
    "huge start": chunk_change(start=2**61),
    "negative start": chunk_change(start=-8),
    "start beyond the last value": chunk_change(start=10_000),
    "start is a float": chunk_change(start=1e300),
    "start is true": chunk_change(start=True),
    "huge shape": chunk_change(shape=[2**40, 2**40]),
    "chunk outside": chunk_change(offsets=[5, 0]),
    "chunk of other rank": chunk_change(offsets=[0], shape=[45]),
    "half a chunk": chunk_change(shape=[4, 5]),
    "no chunks": tensor_change(chunks=[]),
    "chunks are text": tensor_change(chunks="chunks"),
    "huge tensor": tensor_change(shape=[2**61, 5]),
    "unknown dtype": tensor_change(dtype="F128"),
    "tensor is a list": lambda document: document["tensors"].update({"model.w": []}),
    "no tensors": lambda document: document.pop("tensors") and None,
    "other format": lambda document: document.update(format=99),
    "document is a list": lambda document: [document],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata_is_refused(step: Path, case: str) -> None:
    assert str(step / "metadata.json") in forge(step, HOSTILE[case])


def test_a_shard_that_the_manifest_does_not_know_is_told(step: Path) -> None:
    assert "shard-00009.safetensors is not in the manifest" in forge(step, HOSTILE["file not in the manifest"])


@pytest.mark.parametrize(
    "data",
    [b"[" * 200_000, b'{"format":' + b"9" * 100_000 + b"}", b"\xff\xfe{}", b"", b'{"format": NaN}', b"{} {}"],
    ids=["nested", "long number", "not utf-8", "empty", "nan", "two documents"],
)
def test_hostile_json_is_refused(step: Path, data: bytes) -> None:
    assert str(step / "metadata.json") in forge_bytes(step, data)
    (step / "manifest.json").write_bytes(data)
    assert str(step / "manifest.json") in refused(step)


@pytest.mark.parametrize("name", ["../step-10/train_state.json", "/etc/passwd", ".", "..", "a/b", "", "x" * 300])
def test_a_manifest_with_a_path_is_refused(step: Path, name: str) -> None:
    manifest = read_manifest(step)
    files = manifest.files | {name: FileSum(size=1, xxh3_128="0" * 32)}
    (step / "manifest.json").write_bytes(manifest_to_json(manifest.model_copy(update={"files": files})))
    assert "the manifest is damaged" in refused(step)


def test_a_manifest_that_does_not_list_the_index_is_refused(step: Path) -> None:
    manifest = read_manifest(step)
    files = {name: file for name, file in manifest.files.items() if name != "metadata.json"}
    (step / "manifest.json").write_bytes(manifest_to_json(manifest.model_copy(update={"files": files})))
    assert "does not list metadata.json" in refused(step)


def test_a_huge_file_is_refused_unread(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST", 100)
    assert "at most 100 are accepted" in refused(step)


def test_absurd_sizes_do_not_take_memory(step: Path) -> None:
    def load_with_little_memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))

        def grow(document: dict[str, Any]) -> None:
            tensor = document["tensors"]["model.w"]
            tensor["shape"] = tensor["chunks"][0]["shape"] = [2**20, 2**20]

        assert str(step / "metadata.json") in forge(step, grow)

    assert forked(load_with_little_memory) == 0
