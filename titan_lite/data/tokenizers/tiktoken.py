"""tiktoken: an encoding by name, or a local file of base64 tokens and ranks (Llama 3's tokenizer.model)."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, KEY_MISSING, NOT_ALLOWED, ConfigError, Problem
from titan_lite.data.tokenizer import Ids, Tokenizer, read_vocabulary, required_eos, special_id

if TYPE_CHECKING:
    import tiktoken

    from titan_lite.job import Job

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class Family(NamedTuple):
    """What a file of ranks does not say: how text is split before merging, and the specials with their ids."""

    pattern: str
    specials: dict[str, int]


def llama3_specials() -> dict[str, int]:
    """The 256 specials after Llama 3's 128000 ranks. Source: meta-llama/llama3, llama/tokenizer.py."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    return {name: 128000 + i for i, name in enumerate(names)}


FAMILIES = {
    "gpt2": Family(GPT2_PATTERN, {"<|endoftext|>": 50256}),
    "p50k": Family(GPT2_PATTERN, {"<|endoftext|>": 50256}),
    "cl100k": Family(
        CL100K_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k": Family(O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "llama3": Family(CL100K_PATTERN, llama3_specials()),
}
RANKS = {50256: "gpt2", 50280: "p50k", 100256: "cl100k", 199998: "o200k", 128000: "llama3"}
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>")
BOS_NAMES = ("<|begin_of_text|>",)


class Tiktoken(Tokenizer):
    """Byte-level BPE over regex-split words. Of a local file the family (split pattern, specials) is known by its
    number of ranks, or named by `pattern`; a file of no known family gets one special, the end of text."""

    class Config(Tokenizer.Config):
        type: Literal["tiktoken"] = "tiktoken"
        path: str = ""
        """A local file of base64 tokens and ranks (`.tiktoken`, or Llama 3's `tokenizer.model`)."""
        encoding: str = ""
        """An encoding of the tiktoken library by name, for instance "cl100k_base" (downloaded once, then cached)."""
        pattern: str = ""
        """For `path`: a family (gpt2, p50k, cl100k, o200k, llama3), or the regular expression that splits text into
        words. Empty = by the number of ranks."""
        eos: str = ""
        """The end-of-text token. Empty = the vocabulary's own ("<|endoftext|>" where `pattern` is an expression)."""
        bos: str = ""
        """The begin-of-text token. Empty = the vocabulary's own, if it has one."""

        def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
            if bool(self.path) == bool(self.encoding):
                yield Problem(CROSS_FIELD, ".path", "give exactly one of `path` (a local file) and `encoding` (a name)")
            elif self.path and not Path(os.path.expanduser(self.path)).is_file():
                yield Problem(FILE_MISSING, ".path", "there is no such file", value=self.path)
            if self.encoding and self.pattern:
                yield Problem(CROSS_FIELD, ".pattern", "an `encoding` has its own pattern", value=self.pattern)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.backend = from_file(config) if config.path else from_name(config.encoding)
        specials = {name: self.backend.encode_single_token(name) for name in self.backend.special_tokens_set}
        eos = special_id("tokenizer.eos", config.eos, EOS_NAMES, specials)
        self.eos_id = required_eos(eos, config.path or config.encoding)
        self.bos_id = special_id("tokenizer.bos", config.bos, BOS_NAMES, specials)
        self.vocab_size = self.backend.n_vocab
        self.specials = specials
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in ranks_of(self.backend).items():
            self.token_bytes[rank] = len(token)

    def encode(self, text: str, continued: bool = False) -> Ids:
        return self.backend.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self.specials.values())
        return self.backend.decode([i for i in map(int, ids) if i not in special])

    def files(self) -> dict[str, bytes]:
        ranks = sorted((rank, token) for token, rank in ranks_of(self.backend).items())
        lines = (base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for rank, token in ranks)
        return {"tokenizer.model": b"".join(lines)}

    def content(self) -> bytes:
        specials = repr(sorted(self.specials.items())).encode()
        return b"\0".join((self.files()["tokenizer.model"], self.backend._pat_str.encode(), specials))


def ranks_of(backend: tiktoken.Encoding) -> dict[bytes, int]:
    """Token -> rank, without the specials (the library has no public name for it)."""
    return backend._mergeable_ranks


def from_name(name: str) -> tiktoken.Encoding:
    """One of the library's own encodings."""
    import tiktoken

    if name not in (names := tiktoken.list_encoding_names()):
        why = "the tiktoken library has no such encoding"
        raise ConfigError.at("tokenizer.encoding", why, value=name, allowed=", ".join(names), code=NOT_ALLOWED)
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the download raises
        why = (
            f"its vocabulary is not cached here and cannot be downloaded ({error}); give a local file as tokenizer.path"
        )
        raise ConfigError.at("tokenizer.encoding", why, value=name) from error


def from_file(config: Tiktoken.Config) -> tiktoken.Encoding:
    """The encoding of a local file."""
    import tiktoken

    path = Path(os.path.expanduser(config.path))
    ranks = parse_ranks(read_vocabulary(path), config.path)
    name = config.pattern or RANKS.get(len(ranks), "")
    if not name:
        why = f"the file has {len(ranks)} ranks, which no known family has; say how text is split into words"
        allowed = f"{', '.join(FAMILIES)}, or a regular expression"
        raise ConfigError.at("tokenizer.pattern", why, allowed=allowed, code=KEY_MISSING)
    family = FAMILIES.get(name) or Family(name, {config.eos or EOS_NAMES[1]: max(ranks.values()) + 1})
    taken = set(ranks.values()) & set(family.specials.values())
    if taken:
        why = f"does not fit: the file has ranks (such as {min(taken)}) where the family {name!r} has specials"
        raise ConfigError.at("tokenizer.pattern", why, value=name)
    try:
        return tiktoken.Encoding(
            path.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=family.specials
        )
    except ValueError as error:
        raise ConfigError.at("tokenizer.pattern", f"is not a regular expression: {error}", value=name) from error


def parse_ranks(content: bytes, path: str) -> dict[bytes, int]:
    """{token: rank} of a file with one `base64 rank` per line; every single byte has one."""
    ranks = dict(parse_line(line, number, path) for number, line in enumerate(content.splitlines(), start=1))
    if len(set(ranks.values())) < len(ranks):
        raise ConfigError.at("tokenizer.path", "two of its tokens have the same rank", value=path)
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ConfigError.at(
            "tokenizer.path", "some single bytes have no rank, so not every text can be encoded", value=path
        )
    return ranks


def parse_line(line: bytes, number: int, path: str) -> tuple[bytes, int]:
    """(token, rank) of one line."""
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except ValueError as error:
        why = f"line {number} is not a base64 token and its rank"
        raise ConfigError.at("tokenizer.path", why, value=path) from error
