"""scripts/train_tokenizer.py: what it writes is a working tokenizer of ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.common import tokenizer, write_jsonl
from titan_lite.config.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
TEXT = "def run(self):\n    return [1, 2]\n\n\n# é ☃\0 </s> <|endoftext|>\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = ["def", "self", "return", "import", "class", "None", "value", "list", "index", "name"]
    lines = [f"{a} {b}({c}):\n    {d} = {a}\n" for a in words for b in words for c in words[:3] for d in words[:2]]
    write_jsonl(folder / "a.jsonl", ["".join(lines[i : i + 20]) for i in range(0, len(lines), 20)])
    return folder


@pytest.mark.parametrize(("kind", "size"), [("bpe", 300), ("unigram", 300)])
def test_trains_a_tokenizer_that_gives_back_every_text(
    kind: str, size: int, script: ModuleType, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--type", kind, "--vocab-size", str(size), "--out", str(out), "--source", f"{corpus}/*.jsonl"]
    script.main(arguments)
    shown = capfd.readouterr()
    assert "documents" in shown.err
    table = {
        "bpe": {"type": "huggingface", "path": str(out)},
        "unigram": {"type": "sentencepiece", "path": str(out / "tokenizer.model")},
    }[kind]
    subject = tokenizer(**table)
    assert subject.vocab_size == size
    ids = subject.encode(TEXT)
    assert subject.decode(ids) == TEXT
    assert subject.token_bytes[ids].sum() == len(TEXT.encode())
    assert subject.eos_id not in ids
    code = "def self(value):\n    return = list\n"
    assert len(subject.encode(code)) < len(code) / 2
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="not overwritten"):
        script.main(arguments)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--vocab-size": "256"}, "--vocab-size = 256"),
        ({"--vocab-size": "100000"}, "--vocab-size = 100000"),
        ({"--vocab-size": "100000", "--type": "unigram"}, "--vocab-size = 100000"),
        ({"--source": "nowhere"}, "there is no nowhere"),
        ({"--source": "hf:"}, "--source"),
        ({"--text-key": "body"}, "there is no key 'body'"),
    ],
)
def test_bad_arguments_are_config_errors(
    changes: dict[str, str], message: str, script: ModuleType, corpus: Path, tmp_path: Path
) -> None:
    given = {"--type": "bpe", "--vocab-size": "300", "--out": str(tmp_path / "out"), "--source": str(corpus)} | changes
    with pytest.raises(ConfigError) as caught:
        script.main([word for pair in given.items() for word in pair])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_max_documents_limits_what_is_read(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"word{i} " * 50 for i in range(40)])
    arguments = ["--type", "bpe", "--vocab-size", "260", "--out", str(tmp_path / "out"), "--source", str(corpus)]
    script.main([*arguments, "--max-documents", "1"])
    assert "1/1" in capfd.readouterr().err


def test_runs_as_a_command_from_anywhere(corpus: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--type",
        "bpe",
        "--vocab-size",
        "100",
        "--out",
        "x",
        "--source",
        str(corpus),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "--vocab-size" in done.stderr
    assert "Traceback" not in done.stderr
