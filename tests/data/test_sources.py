"""What the sources read, and what they say about data that is not as it should be."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.data.common import everything, source, write_jsonl
from titan_lite.config.errors import ConfigError
from titan_lite.data.source import Source
from titan_lite.data.sources.files import Files
from titan_lite.data.sources.huggingface import HuggingFace

TEXTS = ["one\r\n", "zwei é", "三\n\n", "four " * 50]
ROWS: list[str | None] = [TEXTS[0], None, TEXTS[1], "", TEXTS[2], TEXTS[3]]
EXPECTED = [(0, TEXTS[0]), (2, TEXTS[1]), (4, TEXTS[2]), (5, TEXTS[3])]


def jsonl(rows: list[str | None]) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in rows).encode()


def parquet(rows: list[str | None], path: Path, group: int = 2) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": range(len(rows))}), path, row_group_size=group)


def make(path: Path) -> Path:
    """The file of ROWS in the format that its ending says."""
    content = jsonl(ROWS)
    if path.suffix == ".parquet":
        parquet(ROWS, path)
    elif path.suffix == ".gz":
        half = content.index(b"\n") + 1
        path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))  # two members
    elif path.suffix == ".zst":
        frames = [
            zstandard.ZstdCompressor(write_checksum=True).compress(content[i : i + 20])
            for i in range(0, len(content), 20)
        ]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(content)
    return path


def read(subject: Source, start: int = 0, keep: Callable[[int], bool] = everything) -> list[tuple[int, str]]:
    return [pair for shard in subject.shards() for pair in subject.read(shard, start, keep)]


FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_documents(ending: str, tmp_path: Path) -> None:
    subject = source(type="files", path=str(make(tmp_path / f"a{ending}")))
    assert read(subject) == EXPECTED
    assert subject.dropped == 2
    assert read(subject, start=4) == EXPECTED[2:]
    assert read(subject, start=3, keep=lambda row: row != 4) == EXPECTED[3:]
    assert read(subject, start=6) == []


def test_txt_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("á\r\nb\n".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    subject = source(type="files", path=str(tmp_path))
    assert read(subject) == [(0, "á\r\nb\n")]
    assert subject.dropped == 1
    assert read(subject, start=1) == []
    assert read(subject, keep=lambda row: False) == []


def test_blank_lines_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n  \n')
    subject = source(type="files", path=str(path))
    assert read(subject) == [(0, "a"), (2, "b")]
    assert subject.dropped == 2


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert read(source(type="files", path=str(tmp_path))) == [(0, "a"), (1, "b")]


def test_text_key_is_configurable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    assert read(source(type="files", path=str(tmp_path), text_key="body")) == [(0, "a")]


def test_paths_folders_globs_lists_and_urls(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [name])

    def names(path: object) -> list[str]:
        return list(source(type="files", path=path).shards())

    assert names(str(tmp_path)) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert names(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert names(f"{tmp_path}/b.jsonl") == ["b.jsonl"]
    assert names([f"{tmp_path}/b.jsonl", f"{tmp_path}/deep"]) == ["b.jsonl", "c.jsonl"]
    assert names([f"{tmp_path}/b.jsonl", f"{tmp_path}/b.jsonl"]) == ["0:b.jsonl", "1:b.jsonl"]
    assert names(f"file://{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("ending", FORMATS)
def test_fsspec_urls_read_as_local_files_do(ending: str, tmp_path: Path) -> None:
    local = make(tmp_path / f"a{ending}")
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/corpus/{ending}/a{ending}", local.read_bytes())
    for url in (
        f"memory://corpus/{ending}/a{ending}",
        f"memory://corpus/{ending}",
        f"memory://corpus/{ending}/*{ending}",
    ):
        subject = source(type="files", path=url)
        assert list(subject.shards()) == [f"a{ending}"]
        assert read(subject) == EXPECTED
        assert subject.fingerprint() == source(type="files", path=str(local)).fingerprint()


def test_fingerprint_does_not_depend_on_the_place_but_on_names_sizes_and_key(tmp_path: Path) -> None:
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", ["a" if folder != "z" else "ab"])
    prints = {folder: source(type="files", path=str(tmp_path / folder)).fingerprint() for folder in ("x", "y", "z")}
    assert prints["x"] == prints["y"] != prints["z"]
    assert source(type="files", path=str(tmp_path / "x"), text_key="t").fingerprint() != prints["x"]


BAD = [
    (b'{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2: not valid JSON"),
    (b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: expected a JSON object, got an array"),
    (b'{"text": "a"}\n3\n', "a.jsonl, line 2: expected a JSON object, got a number"),
    (b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: there is no key 'text' (text_key) among 'txt'"),
    (b'{"text": "a"}\n{"text": 5}\n', "a.jsonl, line 2: 'text' should be a string, got a number"),
    (b'{"text": "a"}\n{"text": ["b"]}\n', "a.jsonl, line 2: 'text' should be a string, got an array"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8 (byte 10 of the line"),
    (b'{"text": "a"}\n{"text": "\\ud800x"}\n', "a.jsonl, line 2: 'text' holds half a surrogate pair"),
    (b'{"text": "a"}\n{"text": "cut', "a.jsonl, line 2: not valid JSON"),
    (b'{"text": "a"}\n' + b"[" * 100000 + b"\n", "a.jsonl, line 2: not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("ending", FORMATS[:3])
def test_bad_rows_are_named(content: bytes, message: str, ending: str, tmp_path: Path) -> None:
    compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}[ending]
    (tmp_path / f"a{ending}").write_bytes(compress(content))
    with pytest.raises(ConfigError, match=r"data\.source") as caught:
        read(source(type="files", path=str(tmp_path)))
    assert f"{tmp_path}/{message.replace('a.jsonl', 'a' + ending)}" in str(caught.value)


def test_bad_txt_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\nok\n\xff\n")
    with pytest.raises(ConfigError, match=r"a\.txt, line 3: not UTF-8"):
        read(source(type="files", path=str(tmp_path)))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.97])
def test_truncated_files_are_refused(ending: str, keep: float, tmp_path: Path) -> None:
    path = make(tmp_path / f"a{ending}")
    whole = path.read_bytes()
    if ending == ".jsonl.zst":
        whole = zstandard.ZstdCompressor().compress(
            jsonl(ROWS * 50)
        )  # one frame: cutting between two leaves a sound file
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ConfigError, match=f"a{ending}.*damaged"):
        read(source(type="files", path=str(path)))


def test_flipped_gzip_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    content = bytearray(gzip.compress(jsonl([str(i) * 20 for i in range(200)])))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz"):
        read(source(type="files", path=str(path)))


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: the column 'text' should hold strings, it holds int64"):
        read(source(type="files", path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"a.parquet: there is no column 'x' \(text_key\) among 'text'"):
        read(source(type="files", path=str(tmp_path), text_key="x"))


def test_parquet_bad_utf8_names_the_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers()) if raw.type != pyarrow.string() else raw
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet, row 1: not UTF-8"):
        read(source(type="files", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "why"),
    [("", "which files"), ("nowhere.jsonl", "there is no"), ("*.jsonl", "no file matches"), (".", "holds no file")],
)
def test_missing_files_are_a_problem_and_an_error(path: str, why: str, tmp_path: Path) -> None:
    config = Files.Config(path=f"{tmp_path}/{path}" if path else "")
    (problem,) = config.problems(None, None)  # type: ignore[arg-type]
    assert problem.key == ".path"
    assert why in problem.why
    with pytest.raises(ConfigError):
        config.build().shards()


def test_unknown_endings_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (problem,) = Files.Config(path=f"{tmp_path}/a.csv").problems(None, None)  # type: ignore[arg-type]
    assert ".jsonl.zst" in problem.allowed
    with pytest.raises(ConfigError, match="none of the endings"):
        read(source(type="files", path=f"{tmp_path}/a.csv"))


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    subject = source(type="files", path=str(path))
    assert read(subject) == [(0, "a")]
    path.unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl: No such file"):
        read(subject)


def test_python_stdlib_is_real_text_without_tests_and_packages() -> None:
    subject = source(type="python_stdlib")
    shards = list(subject.shards())
    assert shards == sorted(shards)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(shards)
    assert not [name for name in shards if {"site-packages", "test", "tests", "idle_test"} & set(name.split("/"))]
    (document,) = subject.read("argparse.py", 0, everything)
    import argparse

    assert document == (0, Path(argparse.__file__).read_bytes().decode())
    assert sum(len(text) for _, text in read(subject)) > 5_000_000
    assert subject.fingerprint() == source(type="python_stdlib").fingerprint()


def test_python_stdlib_leaves_out_and_reports_what_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (tmp_path / "empty.py").write_text("")
    subject = source(type="python_stdlib")
    assert read(subject) == [(0, "x = 1\n")]
    assert subject.dropped == 2
    assert "latin.py is left out" in caplog.text


@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_huggingface_streams_local_files(builder: str, tmp_path: Path) -> None:
    ending = ".jsonl" if builder == "json" else ".parquet"
    make(tmp_path / f"a{ending}")
    make(tmp_path / f"b{ending}")
    subject = source(type="huggingface", path=builder, data_files=[f"{tmp_path}/*{ending}"])
    assert list(subject.shards()) == ["00000-of-00002", "00001-of-00002"]
    assert read(subject) == EXPECTED * 2
    assert subject.dropped == 4
    assert read(subject, start=4) == EXPECTED[2:] * 2
    assert subject.fingerprint() == source(**dict(subject.config)).fingerprint()
    before = subject.fingerprint()
    write_jsonl(tmp_path / "a.jsonl", ["other"]) if builder == "json" else parquet(["other"], tmp_path / "a.parquet")
    assert source(**dict(subject.config)).fingerprint() != before


def test_huggingface_faults_are_config_errors(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    good = {"type": "huggingface", "path": "json", "data_files": [str(tmp_path / "a.jsonl")]}
    with pytest.raises(ConfigError, match="row 0: there is no key 'body'"):
        read(source(**good, text_key="body"))
    with pytest.raises(ConfigError, match="test"):
        read(source(**good, split="test"))
    with pytest.raises(ConfigError, match=r"data\.source\.path"):
        read(source(type="huggingface", path="nobody/there"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(ConfigError, match=r"shard 00000-of-00001|cannot be opened"):
        read(source(**good))
    assert [problem.key for problem in HuggingFace.Config().problems(None, None)] == [".path"]  # type: ignore[arg-type]
