"""Documents to tokens, a bounded piece at a time, so that a document of any size costs little more than its text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.data.tokenizer import Ids, Tokenizer

PIECE = 1 << 18
"""Characters after which a document is cut at the next good place."""
REACH = 1 << 16
"""How many further characters are searched for one."""

CUTS = (
    # A line end alone between visible characters: no word-splitting expression of the GPT families joins what is left
    # and right of it, so that the pieces give the same tokens as the whole.
    re.compile(r"(?<=\S)\n(?=\S)"),
    # A line end before an indented line: the same holds for cl100k, Llama 3 and o200k; GPT-2 joins it with the indent.
    re.compile(r"(?<=\S)\n(?=[ \t]+\S)"),
    re.compile(r"\n"),
    re.compile(r"(?=\s)"),
)
"""Where to cut, best first; without any of them in the middle of a word."""


def piece_end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: a function of the text alone, so that pieces can be found again."""
    first = start + PIECE
    if len(text) <= first + REACH:
        return len(text)
    found = (cut.search(text, first, first + REACH) for cut in CUTS)
    return next((match.end() for match in found if match), first)


@dataclass(frozen=True)
class Framing:
    """A document is [begin of text] + its tokens + [end of text]."""

    tokenizer: Tokenizer
    bos_id: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, bos: bool | None) -> Framing:
        """`bos` is the setting data.bos."""
        if bos and tokenizer.bos_id is None:
            raise ConfigError.at("data.bos", "the tokenizer has no begin-of-text token", value=bos, code=CROSS_FIELD)
        if bos is None:
            bos = tokenizer.bos_id not in (None, tokenizer.eos_id)
        return cls(tokenizer, tokenizer.bos_id if bos else None)

    def encode(self, text: str, start: int, end: int) -> Ids:
        """Tokens of the document's piece [start, end): the first one has the begin of text, the last one the end."""
        ids = self.tokenizer.encode(text[start:end], continued=start > 0)
        before = [self.bos_id] if start == 0 and self.bos_id is not None else []
        after = [self.tokenizer.eos_id] if end == len(text) else []
        return np.concatenate((np.array(before, dtype=np.int64), ids, np.array(after, dtype=np.int64)))


def prompt_ids(tokenizer: Tokenizer, bos: bool | None, text: str) -> list[int]:
    """Tokens of a document that begins with `text`, as training would have seen them; never empty."""
    framing = Framing.of(tokenizer, bos)
    start = framing.bos_id if framing.bos_id is not None else tokenizer.eos_id
    return [start, *tokenizer.encode(text).tolist()]
