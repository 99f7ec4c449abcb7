"""Text as it comes out of tokens."""

from __future__ import annotations

import random
from pathlib import Path

import mistral_common
import pytest

from titan_lite.data.tokenizer import Bytes, Tokenizer
from titan_lite.generation.text import TextStream, visible

SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
TEXT = "Hello world, naïve café 日本語 👩‍👩‍👧 done.\n\n  def f(x):\n\treturn 'ok'"


def raw_bytes() -> Bytes:
    built: Bytes = Bytes.Config().build()
    return built


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return raw_bytes()
    built: Tokenizer = Tokenizer.Config.choose({"type": "sentencepiece", "path": str(SENTENCEPIECE)}).build()
    return built


def streamed(stream: TextStream, tokens: list[int]) -> list[str]:
    """What each token brought, up to a stop string, and what was left."""
    parts = []
    for token in tokens:
        stopped = stream.add(token)
        parts.append(stream.news())
        if stopped:
            break
    return [*parts, stream.rest()]


def test_pieces_make_the_text(tokenizer: Tokenizer) -> None:
    """Whole characters as soon as they are there, whatever stands before; the space between prompt and text is kept."""
    for before in ("", "A prompt", "日"):
        first, both = tokenizer.encode(before).tolist(), tokenizer.encode(before + " " + TEXT).tolist()
        assert both[: len(first)] == first
        parts = streamed(TextStream(tokenizer, before=first), both[len(first) :])
        assert before + "".join(parts) == tokenizer.decode(both)
        assert not any("\ufffd" in part for part in parts)
        assert parts[-1] == ""


def test_bytes_that_are_no_text_come_as_they_are_decoded() -> None:
    tokenizer, draw = raw_bytes(), random.Random(0)
    for _ in range(300):
        tokens = draw.choices([65, 66, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC3], k=12)
        assert "".join(streamed(TextStream(tokenizer, before=[0xFE, 65]), tokens)) == tokenizer.decode(tokens)


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    tokenizer, sizes = raw_bytes(), list[int]()
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        sizes.append(len(list(ids)))
        return decode(ids)

    tokenizer.decode = counted  # type: ignore[method-assign, assignment]
    stream = TextStream(tokenizer, before=list(b"prompt"))
    for token in "日本語 text ".encode() * 50:
        stream.add(token)
    assert max(sizes[20:]) <= 8


@pytest.mark.parametrize("stops", [["café"], ["é 日"], ["nothing", "語"], ["world", "Hello world"], ["\n\n  d"]])
def test_a_stop_string_ends_the_text_wherever_it_lies(tokenizer: Tokenizer, stops: list[str]) -> None:
    tokens = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, stops, before=tokenizer.encode("So:").tolist())
    parts = streamed(stream, tokenizer.encode("So: " + TEXT).tolist()[len(tokenizer.encode("So:")) :])
    text = " " + TEXT
    expected = text[: min(text.find(stop) for stop in stops if stop in text)]
    assert stream.stopped
    assert "".join(parts) == stream.text == expected
    assert len(parts) - 1 < len(tokens)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = raw_bytes()
    parts = streamed(TextStream(tokenizer, ["abcd", "bx"]), list(b"zabcabce"))
    assert parts == ["z", "", "", "", "abc", "", "", "abce", ""]
    assert streamed(TextStream(tokenizer, ["abcd"]), list(b"zabc"))[-2:] == ["", "abc"]
    assert streamed(TextStream(tokenizer, ["abcd"]), list(b"zabcd"))[-2:] == ["", ""]


def test_the_terminal_gets_nothing_to_obey() -> None:
    assert visible("a\x1b[2Jb\r\n\tc") == "a\ufffd[2Jb\ufffd\n\tc"
