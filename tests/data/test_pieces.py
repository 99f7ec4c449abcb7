"""Documents cut into pieces give the tokens of the whole."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path

import mistral_common
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.common import raw_bytes, tokenizer
from titan_lite.config.errors import ConfigError
from titan_lite.data import pieces
from titan_lite.data.pieces import Framing, piece_end
from titan_lite.data.tokenizers.tiktoken import FAMILIES

MISTRAL = Path(mistral_common.__file__).parent / "data"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 200)
    monkeypatch.setattr(pieces, "REACH", 400)


def cuts(text: str) -> list[tuple[int, int]]:
    out = [(0, piece_end(text, 0))]
    while out[-1][1] < len(text):
        out.append((out[-1][1], piece_end(text, out[-1][1])))
    return out


@pytest.mark.usefixtures("small_pieces")
@given(st.text(max_size=3000))
@settings(max_examples=50, deadline=None)
def test_pieces_cover_the_text_and_stay_small(text: str) -> None:
    found = cuts(text)
    assert "".join(text[start:end] for start, end in found) == text
    assert all(end - start <= 600 for start, end in found)
    framing = Framing.of(raw_bytes(), None)
    ids = [i for start, end in found for i in framing.encode(text, start, end).tolist()]
    assert ids == [0xFE, *text.encode(), 0xFF]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("family", "indented"), [("gpt2", False), ("cl100k", False), ("cl100k", True), ("o200k", False), ("o200k", True)]
)
def test_word_splitting_families_give_the_same_tokens_in_pieces(family: str, indented: bool) -> None:
    code = Path(argparse.__file__).read_text()
    text = code if indented else "\n".join(line.lstrip() for line in code.split("\n"))
    vocabulary = json.loads((MISTRAL / "tekken_240911.json").read_text())["vocab"][:5000]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in vocabulary}
    encoding = tiktoken.Encoding("cut", pat_str=FAMILIES[family].pattern, mergeable_ranks=ranks, special_tokens={})
    found = cuts(text)
    assert len(found) > 100
    assert [i for a, b in found for i in encoding.encode_ordinary(text[a:b])] == encoding.encode_ordinary(text)


@pytest.mark.usefixtures("small_pieces")
def test_sentencepiece_gives_the_same_tokens_in_pieces() -> None:
    subject = tokenizer(type="sentencepiece", path=str(MISTRAL / "tokenizer.model.v1"))
    text = Path(argparse.__file__).read_text()[:20000]
    framing = Framing.of(subject, None)
    whole = [subject.bos_id, *subject.encode(text), subject.eos_id]
    assert [i for a, b in cuts(text) for i in framing.encode(text, a, b)] == whole


@pytest.mark.usefixtures("small_pieces")
def test_text_without_lines_or_spaces_is_cut_anyway() -> None:
    assert max(end - start for start, end in cuts("x" * 5000)) <= 600
    assert all(("x " * 2000)[start] == " " for start, _ in cuts("x " * 2000)[1:])


def test_framing_follows_the_setting() -> None:
    assert Framing.of(raw_bytes(), None).encode("a", 0, 1).tolist() == [0xFE, 97, 0xFF]
    assert Framing.of(raw_bytes(), False).encode("a", 0, 1).tolist() == [97, 0xFF]
    without = raw_bytes()
    without.bos_id = None
    assert Framing.of(without, None).encode("a", 0, 1).tolist() == [97, 0xFF]
    with pytest.raises(ConfigError, match=r"data\.bos"):
        Framing.of(without, True)
    same = raw_bytes()
    same.bos_id = same.eos_id
    assert Framing.of(same, None).encode("a", 0, 1).tolist() == [97, 0xFF]
    assert Framing.of(same, True).encode("a", 0, 1).tolist() == [0xFF, 97, 0xFF]
