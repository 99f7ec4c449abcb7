"""SentencePiece `.model` files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from titan_lite.config.errors import FILE_MISSING, KEY_MISSING, ConfigError, Problem
from titan_lite.data.tokenizer import Ids, Tokenizer, read_vocabulary, required_eos, special_id

if TYPE_CHECKING:
    from titan_lite.job import Job


class SentencePiece(Tokenizer):
    """BPE or unigram model. A model with a dummy prefix puts a space before every document: `token_bytes` counts it."""

    class Config(Tokenizer.Config):
        type: Literal["sentencepiece"] = "sentencepiece"
        path: str = ""
        """The `.model` file."""
        eos: str = ""
        """The end-of-text piece, for instance "</s>". Empty = the model's own."""
        bos: str = ""
        """The begin-of-text piece. Empty = the model's own, if it has one."""

        def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
            if not self.path:
                yield Problem(KEY_MISSING, ".path", "say which SentencePiece model: a .model file")
            elif not Path(os.path.expanduser(self.path)).is_file():
                yield Problem(FILE_MISSING, ".path", "there is no such file", value=self.path)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = read_vocabulary(Path(os.path.expanduser(config.path)))
        try:
            self.backend = processor(self.model)
        except Exception as error:  # the library raises RuntimeError or ParseError depending on its version
            why = f"is not a SentencePiece model: {error}"
            raise ConfigError.at("tokenizer.path", why, value=config.path) from error
        self.vocab_size = self.backend.vocab_size()
        vocabulary = {self.backend.id_to_piece(i): i for i in range(self.vocab_size)}
        eos = special_id("tokenizer.eos", config.eos, (), vocabulary)
        bos = special_id("tokenizer.bos", config.bos, (), vocabulary)
        self.eos_id = required_eos(known(self.backend.eos_id()) if eos is None else eos, config.path)
        self.bos_id = known(self.backend.bos_id()) if bos is None else bos
        self.token_bytes = np.array([self._size(i) for i in range(self.vocab_size)], dtype=np.int64)

    def encode(self, text: str, continued: bool = False) -> Ids:
        backend = self._without_prefix if continued else self.backend
        return np.array(backend.encode(text, out_type=int), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids])

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    def content(self) -> bytes:
        return self.model

    @cached_property
    def _without_prefix(self) -> Any:
        """The same model without the space it puts before a text: for the later pieces of a long document."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self.model)  # type: ignore[attr-defined]
        model.normalizer_spec.add_dummy_prefix = False
        return processor(model.SerializeToString())

    def _size(self, i: int) -> int:
        if self.backend.is_byte(i):
            return 1
        if self.backend.is_control(i) or self.backend.is_unknown(i) or self.backend.is_unused(i):
            return 0
        return len(self.backend.id_to_piece(i).replace("▁", " ").encode())


def processor(model: bytes) -> Any:
    """A SentencePieceProcessor (untyped library) of a serialized model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


def known(i: int) -> int | None:
    """SentencePiece says -1 for a special that the model does not have."""
    return None if i < 0 else i
