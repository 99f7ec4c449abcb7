"""Tokens with which a model ends what it says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from titan_lite.config.errors import ConfigError
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizers.huggingface import HuggingFace
from titan_lite.data.tokenizers.sentencepiece import SentencePiece
from titan_lite.generation.chat import Chat
from titan_lite.hf.installed import has_transformers
from titan_lite.hf.stored import read_json
from titan_lite.hf.tokenizer_files import chat_template

GENERATION: Final = "generation_config.json"
EOS: Final = "eos_token_id"


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Those that the files of a Hugging Face model beside the tokenizer's list, the end of text, and the special that
    the chat template puts behind an answer (where transformers is installed, which reads templates)."""
    file = _file(tokenizer)
    listed = [] if file is None else [end for end in listed_ends(file.parent) if end < tokenizer.vocab_size]
    return tuple(dict.fromkeys([*listed, tokenizer.eos_id, *_of_turns(tokenizer)]))


def listed_ends(folder: Path) -> list[int]:
    """Ends in the generation_config.json of a folder, or else in its config.json, as transformers reads them."""
    for name in (GENERATION, "config.json"):
        if (folder / name).is_file():
            named: Any = read_json(folder / name).get(EOS)
            listed = named if isinstance(named, list) else [named]
            return [end for end in listed if isinstance(end, int) and end >= 0]
    return []


def _file(tokenizer: Tokenizer) -> Path | None:
    """The tokenizer's file on this machine."""
    if isinstance(tokenizer, HuggingFace):
        return tokenizer.config.file()
    return Path(os.path.expanduser(tokenizer.config.path)) if isinstance(tokenizer, SentencePiece) else None


def _of_turns(tokenizer: Tokenizer) -> list[int]:
    if chat_template(tokenizer) is None or not has_transformers():
        return []
    try:
        return sorted(Chat(tokenizer).ends())
    except ConfigError:  # a template may refuse a conversation as simple as this one
        return []
