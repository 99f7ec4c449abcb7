"""Hugging Face `tokenizer.json`, through the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from titan_lite.config.errors import FILE_MISSING, KEY_MISSING, ConfigError, Problem
from titan_lite.data.tokenizer import Ids, Tokenizer, read_vocabulary, required_eos, special_id

if TYPE_CHECKING:
    import tokenizers

    from titan_lite.job import Job

EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")
BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]")
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")


class HuggingFace(Tokenizer):
    """Any pipeline the `tokenizers` library reads."""

    class Config(Tokenizer.Config):
        type: Literal["huggingface"] = "huggingface"
        path: str = ""
        """A tokenizer.json, a folder with one, or a name on the Hugging Face hub (downloaded once, then cached)."""
        eos: str = ""
        """The end-of-text token, for instance "</s>". Empty = what tokenizer_config.json or habit says."""
        bos: str = ""
        """The begin-of-text token. Empty = what tokenizer_config.json or habit says, if anything."""

        def file(self) -> Path | None:
            """The tokenizer.json on this machine; None where `path` is a name on the hub."""
            path = Path(os.path.expanduser(self.path))
            if path.is_dir():
                return path / "tokenizer.json"
            local = path.exists() or path.is_absolute() or path.suffix == ".json" or self.path.startswith(".")
            return path if local or len(path.parts) > 2 else None

        def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
            file = self.file() if self.path else None
            if not self.path:
                yield Problem(
                    KEY_MISSING, ".path", "say which tokenizer: a tokenizer.json, a folder with one, or a hub name"
                )
            elif file is not None and not file.is_file():
                yield Problem(FILE_MISSING, ".path", f"there is no file {file}", value=self.path)

    def __init__(self, config: Config) -> None:
        self.config = config
        file = config.file()
        self.backend = from_hub(config.path) if file is None else from_file(file)
        self.backend.encode_special_tokens = True  # "</s>" inside a document is text, not the end of it
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.side_files = {} if file is None else side_files(file.parent)
        named = special_names(self.side_files, config.path)
        eos_names = (*named.get("eos_token", ()), *EOS_NAMES)
        bos_names = (*named.get("bos_token", ()), *BOS_NAMES)
        self.eos_id = required_eos(special_id("tokenizer.eos", config.eos, eos_names, vocabulary), config.path)
        self.bos_id = special_id("tokenizer.bos", config.bos, bos_names, vocabulary)
        self.vocab_size = max(vocabulary.values()) + 1
        self.token_bytes = self._token_bytes(vocabulary)

    def encode(self, text: str, continued: bool = False) -> Ids:
        backend = self._without_prefix if continued else self.backend
        return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_framed(self, text: str) -> Ids:
        return np.array(self.backend.encode(text, add_special_tokens=True).ids, dtype=np.int64)

    def encode_marked(self, text: str) -> Ids:
        """Ids of a text in which the names of specials are specials: what a chat template has written."""
        self.backend.encode_special_tokens = False
        ids = self.encode(text)
        self.backend.encode_special_tokens = True
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.content()} | self.side_files

    def content(self) -> bytes:
        self.backend.encode_special_tokens = False  # a setting of ours, no part of the file
        text = self.backend.to_str(pretty=True)
        self.backend.encode_special_tokens = True
        return text.encode()

    @cached_property
    def _without_prefix(self) -> Any:
        """The same tokenizer without a space that it puts before a text: for what goes on where another one ended."""
        pipeline = json.loads(self.backend.to_str())
        changed = {part: without_prefix(pipeline[part]) for part in ("normalizer", "pre_tokenizer")}
        if all(pipeline[part] == steps for part, steps in changed.items()):
            return self.backend
        backend = type(self.backend).from_str(json.dumps(pipeline | changed))
        backend.encode_special_tokens = True
        return backend

    def _token_bytes(self, vocabulary: dict[str, int]) -> Ids:
        pipeline = json.loads(self.backend.to_str())
        added = self.backend.get_added_tokens_decoder()
        kinds = {part["type"] for part in parts(pipeline["decoder"])} | {
            p["type"] for p in parts(pipeline["pre_tokenizer"])
        }
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in vocabulary.items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            elif "ByteLevel" in kinds:
                sizes[i] = len(token)  # one printable character stands for each byte
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace("▁", " ").removeprefix("##").encode())
        return sizes


def parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A pipeline stage and, where it is a sequence, the stages in it."""
    if component is not None:
        yield component
        for list_name in ("decoders", "pretokenizers"):
            for inner in component.get(list_name, ()):
                yield from parts(inner)


def from_file(file: Path) -> tokenizers.Tokenizer:
    """The pipeline in a tokenizer.json."""
    import tokenizers

    content = read_vocabulary(file)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError.at("tokenizer.path", f"is not a tokenizer.json: {error}", value=str(file)) from error


def from_hub(name: str) -> tokenizers.Tokenizer:
    """The pipeline of a hub repository."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for every kind of failure
        why = f"is neither a file or folder here nor to be had from the Hugging Face hub: {error}"
        raise ConfigError.at("tokenizer.path", why, value=name, code=FILE_MISSING) from error


def side_files(folder: Path) -> dict[str, bytes]:
    """The files beside tokenizer.json that say which tokens are special."""
    return {name: read_vocabulary(folder / name) for name in SIDE_FILES if (folder / name).is_file()}


def special_names(files: dict[str, bytes], path: str) -> dict[str, list[str]]:
    """{"eos_token": [...], "bos_token": [...]} as the files beside `path` name them."""
    names: dict[str, list[str]] = {}
    for name, content in files.items():
        try:
            table = json.loads(content)
        except ValueError as error:
            raise ConfigError.at("tokenizer.path", f"{name} beside it is not valid JSON: {error}", path) from error
        if not isinstance(table, dict):
            raise ConfigError.at("tokenizer.path", f"{name} beside it does not hold a table", path)
        for role in ("eos_token", "bos_token"):
            token = table.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names.setdefault(role, []).append(token)
    return names


def without_prefix(steps: Any) -> Any:
    """A normalizer or pre-tokenizer of a tokenizer.json, but for a space before texts; None where nothing is left."""
    match steps:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return steps | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return steps | {"add_prefix_space": False}
        case {"normalizers": inner}:
            return steps | {"normalizers": [step for step in map(without_prefix, inner) if step]}
        case {"pretokenizers": inner}:
            return steps | {"pretokenizers": [step for step in map(without_prefix, inner) if step]}
    return steps
