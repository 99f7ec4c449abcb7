"""Tokenizers as files: the same ids in transformers, or a refusal."""

from __future__ import annotations

import base64
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Pipeline

from scripts.train_tokenizer import train_bpe, train_unigram
from titan_lite.config.errors import ConfigError
from titan_lite.data.tokenizer import Bytes, Tokenizer
from titan_lite.hf.tokenizer_files import CONFIG, FILE, SAMPLES, TEMPLATE, merges_of, pipeline, tokenizer_files

TEXTS = ("the quick brown fox and the lazy dog said that it's 12345 ", "def function(self, x):\n    return x\n") * 40


def build(**table: Any) -> Tokenizer:
    built: Tokenizer = Tokenizer.Config.choose(table).build()
    return built


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    for name, content in train_bpe(iter(TEXTS), 300, None).items():
        (folder / name).write_bytes(content)
    return folder


def test_bytes_are_ids() -> None:
    tokenizer = Bytes.Config().build()
    found = Pipeline.from_str(tokenizer_files(tokenizer, tokenizer.bos_id, 128)[FILE].decode())
    assert found.get_vocab_size() == 256
    for text in SAMPLES:
        assert found.encode(text).ids == [0xFE, *text.encode()]
        assert found.decode(found.encode(text).ids) == text
    half = list("é".encode())[:1]
    assert found.decode([*half, 97]) == tokenizer.decode([*half, 97]) == "\ufffda"


def test_merges_follow_from_ranks(bpe: Path, tmp_path: Path) -> None:
    """The same vocabulary as ranks: every merge is found again, and every text has the same ids."""
    trained = Pipeline.from_file(str(bpe / FILE))
    bytes_of = {character: byte for byte, character in enumerate(_characters())}
    vocabulary = {t: i for t, i in trained.get_vocab().items() if not t.startswith("<|")}
    ranks = {bytes(bytes_of[c] for c in token): i - 1 for token, i in vocabulary.items()}
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    (tmp_path / "ranks.tiktoken").write_bytes(b"".join(lines))
    tokenizer = build(type="tiktoken", path=str(tmp_path / "ranks.tiktoken"), pattern="gpt2", eos="<|endoftext|>")
    assert len(merges_of(ranks)) == len(ranks) - 256
    found = pipeline(tokenizer)
    for text in (*SAMPLES, *TEXTS[:2]):
        assert found.encode(text).ids == tokenizer.encode(text).tolist()


def _characters() -> list[str]:
    from titan_lite.hf.tokenizer_files import byte_characters

    return byte_characters()


def test_unigram_pieces(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(
        train_unigram(iter([*TEXTS, Path(textwrap.__file__).read_text()]), 400, None)["tokenizer.model"]
    )
    tokenizer = build(type="sentencepiece", path=str(tmp_path / "m.model"))
    found = Pipeline.from_str(tokenizer_files(tokenizer, None, 128)[FILE].decode())
    for text in (*SAMPLES, *TEXTS[:2]):
        assert found.encode(text).ids == tokenizer.encode(text).tolist()
        assert found.decode(found.encode(text).ids) == tokenizer.decode(tokenizer.encode(text))


def test_a_trained_tokenizer_keeps_its_template(bpe: Path, tmp_path: Path) -> None:
    for file in bpe.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / TEMPLATE).write_text("{{ messages }}")
    files = tokenizer_files(build(type="huggingface", path=str(tmp_path)), None, 128)
    assert files[TEMPLATE] == b"{{ messages }}"
    assert b'"eos_token": "<|endoftext|>"' in files[CONFIG]


def test_what_would_be_other_ids_is_refused(tmp_path: Path) -> None:
    tokenizer = Bytes.Config().build()
    right = tokenizer.encode
    tokenizer.encode = lambda text, continued=False: right(text.lower())
    with pytest.raises(ConfigError, match="gives the same ids"):
        tokenizer_files(tokenizer, None, 128)
