"""`manifest.json`: what a checkpoint is, where it comes from, and the size and checksum of each of its files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titan_lite.checkpoint.folder import MANIFEST, damaged, refuse
from titan_lite.config.errors import Problem

MAX_MANIFEST = 64 * 2**20  # bytes; a real one has some hundred bytes per file
READ_PIECE = 4 * 2**20

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileSum(_Part):
    """Size in bytes and xxh3-128 (hex) of a file."""

    size: Annotated[int, Field(ge=0)]
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class ModelSummary(_Part):
    """The model's tensors: how many, how many values, and xxh3-128 over their sorted names and shapes."""

    tensors: int
    parameters: int
    xxh3_128: str
    config: dict[str, Any]


class Manifest(_Part):
    """Content of `manifest.json`."""

    format: Literal[1] = 1
    run_id: str
    step: Annotated[int, Field(ge=0)]
    parent_step: int | None
    created: str
    config: str
    versions: dict[str, str]
    tokenizer: str
    data: str
    world_size: int
    layout: dict[str, int]
    model: ModelSummary
    model_only: bool
    files: dict[FileName, FileSum]


def manifest_to_json(manifest: Manifest) -> bytes:
    """Canonical JSON with the checksum of everything else in it: any changed byte is noticed."""
    content = manifest.model_dump()
    content["checksum"] = xxhash.xxh3_128_hexdigest(_canonical(content))
    return _canonical(content)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a step folder, its own checksum checked. Raises ConfigError naming the file."""
    path = Path(folder) / MANIFEST
    raw = read_file(path, MAX_MANIFEST)
    try:
        content = json.loads(raw)
        checksum = content.pop("checksum")
        if content.get("format") != 1:
            raise ValueError(f"its format {content.get('format')!r} is not known to this version")
        if checksum != xxhash.xxh3_128_hexdigest(_canonical(content)) or raw != _canonical(
            content | {"checksum": checksum}
        ):
            raise ValueError("its checksum does not match its content")
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise refuse(path, f"the manifest is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(path, f"the manifest is damaged: {str(error)[:300] or type(error).__name__}") from None


def verify(folder: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> list[Problem]:
    """Faulty files of a step folder: missing, of another size, or of another content.

    Sizes are checked for all files; contents are hashed for the share of rank `rank` of `size`.
    """
    problems = []
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    mine = set(by_size[rank::size])
    for name in by_size:
        why = _fault(folder / name, manifest.files[name], hashed=name in mine)
        if why:
            problems.append(damaged(folder / name, why))
    return problems


def _fault(path: Path, expected: FileSum, hashed: bool) -> str:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.size:
                return f"the file has {size} bytes, the manifest says {expected.size}"
            if hashed and (found := _hash(file)) != expected.xxh3_128:
                return f"the file's content is damaged: xxh3-128 {found}, the manifest says {expected.xxh3_128}"
    except OSError as error:
        return _unreadable(error)
    return ""


def _hash(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(READ_PIECE))
    while n := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:n])
    return digest.hexdigest()


def _unreadable(error: OSError) -> str:
    return (
        "the file is missing" if isinstance(error, FileNotFoundError) else f"the file cannot be read: {error.strerror}"
    )


def open_regular(path: Path) -> BinaryIO:
    """Opens a file of a step folder unbuffered; a link, which may lead out of the folder, is refused (OSError)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a regular file")
    return open(fd, "rb", buffering=0)


def read_file(path: Path, limit: int) -> bytes:
    """The whole content of a file of at most `limit` bytes. Raises ConfigError naming the file."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise refuse(path, f"the file has {size} bytes; at most {limit} are accepted")
            return file.read()
    except OSError as error:
        raise refuse(path, _unreadable(error)) from None
