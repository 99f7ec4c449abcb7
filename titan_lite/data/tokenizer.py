"""The tokenizer slot and its default, raw bytes. The types that need a vocabulary file live in `tokenizers/`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from titan_lite.config.component import Component, SlotConfig
from titan_lite.config.errors import KEY_MISSING, ConfigError

Ids = npt.NDArray[np.int64]


class Tokenizer(Component):
    """Text <-> token ids. Subclasses set the attributes below when built."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "tokenizer"
        default_type: ClassVar[str] = "bytes"
        known_vocab_size: ClassVar[int] = 0
        """`vocab_size` of a type that needs no file to know it; 0 = known once built."""

    vocab_size: int
    """Number of ids, specials included: every id is below it."""
    eos_id: int
    """End of text: closes every training document, stops generation."""
    bos_id: int | None
    """Begin of text, where the vocabulary has one."""
    token_bytes: Ids
    """(vocab_size,) bytes of UTF-8 text each id stands for, 0 for specials: nats per token -> bits per byte."""

    def encode(self, text: str, continued: bool = False) -> Ids:
        """Token ids of `text`; specials are never added, and their names inside the text are ordinary text.

        `continued`: the text goes on where another piece of the same document ended, so nothing is put before it.
        """
        raise NotImplementedError

    def encode_framed(self, text: str) -> Ids:
        """As other programs encode a whole text with this vocabulary: behind what they put before it."""
        before = [] if self.bos_id is None else [self.bos_id]
        return np.concatenate((np.array(before, dtype=np.int64), self.encode(text)))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; specials give nothing, bytes that are not UTF-8 (a cut character) give U+FFFD."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """File name -> content of what another program needs to tokenize alike (for export)."""
        raise NotImplementedError

    def content(self) -> bytes:
        """Everything that decides which ids a text gets, as bytes in a canonical order."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """xxh3-128 (hex) of the vocabulary and its specials: equal fingerprints mean equal token ids."""
        digest = xxhash.xxh3_128(self.content())
        digest.update(json.dumps([self.vocab_size, self.eos_id, self.bos_id]).encode())
        return digest.hexdigest()


class Bytes(Tokenizer):
    """Ids are UTF-8 bytes. 0xFE and 0xFF occur in no UTF-8 text: begin and end of text."""

    class Config(Tokenizer.Config):
        type: Literal["bytes"] = "bytes"
        known_vocab_size: ClassVar[int] = 256

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab_size = config.known_vocab_size
        self.bos_id: int | None = 0xFE
        self.eos_id = 0xFF
        self.token_bytes = np.ones(self.vocab_size, dtype=np.int64)
        self.token_bytes[[self.bos_id, self.eos_id]] = 0

    def encode(self, text: str, continued: bool = False) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i not in (self.bos_id, self.eos_id)).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}

    def content(self) -> bytes:
        return b"bytes"


def special_id(key: str, name: str, known: Iterable[str], vocabulary: dict[str, int]) -> int | None:
    """Id of the special token `name` (the setting `key`), or, where that is empty, of the first known name there is."""
    if not name:
        return next((vocabulary[candidate] for candidate in known if candidate in vocabulary), None)
    if name not in vocabulary:
        raise ConfigError.at(key, "the vocabulary has no such token", value=name)
    return vocabulary[name]


def required_eos(eos_id: int | None, where: str) -> int:
    """`eos_id`, or the error that asks for it: documents cannot be told apart without an end-of-text token."""
    if eos_id is None:
        why = f"{where} names no end-of-text token that is known here; name the token to use"
        raise ConfigError.at("tokenizer.eos", why, code=KEY_MISSING)
    return eos_id


def read_vocabulary(path: Path) -> bytes:
    """Content of a vocabulary file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError.at("tokenizer.path", f"cannot be read: {error.strerror}", value=str(path)) from error
