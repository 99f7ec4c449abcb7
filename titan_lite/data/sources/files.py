"""Files of text: local or on any fsspec file system, one file or folder or glob or a list of them."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from titan_lite.config.errors import FILE_MISSING, KEY_MISSING, NOT_ALLOWED, Problem
from titan_lite.data.source import Keep, Source, size_text
from titan_lite.data.sources.formats import FORMATS, BadDataError, Columns, Reader, Texts, reader_of

if TYPE_CHECKING:
    from titan_lite.job import Job


class Entry(NamedTuple):
    """One file: its name below what the user wrote, where it is, its bytes, and its fsspec file system if not local."""

    name: str
    path: str
    size: int
    filesystem: Any = None


class FileSource(Source):
    """One shard per file."""

    class Config(Source.Config):
        path: str | Annotated[tuple[str, ...], Field(strict=False)] = ""
        """A file, a folder (searched deeply), a glob, or a list of them; local, or a URL that fsspec knows ("s3://...").
        By ending: .txt (the file is one document), .jsonl, .jsonl.gz, .jsonl.zst, .parquet."""

        def columns(self) -> Columns:
            """Where a row has its texts."""
            raise NotImplementedError

        def entries(self) -> tuple[str, ...]:
            return (self.path,) if isinstance(self.path, str) else self.path

        def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
            if not any(self.entries()):
                yield Problem(KEY_MISSING, ".path", "say which files to train on")
                return
            for entry in self.entries():
                if "://" in entry:
                    continue  # the network is not asked while a config is checked
                found = local_files(entry)
                bad = [path for path in found if reader_of(path) is None]
                if bad:
                    why = f"cannot be read as text: {bad[0]} has no known ending"
                    yield Problem(NOT_ALLOWED, ".path", why, value=entry, allowed=", ".join(FORMATS))
                elif not found:
                    yield Problem(FILE_MISSING, ".path", missing(entry), value=entry)

    config: Config

    @cached_property
    def files(self) -> dict[str, Entry]:
        """{shard name: file}, sorted by name."""
        found = [list_files(entry) for entry in self.config.entries()]
        for entry, files in zip(self.config.entries(), found, strict=True):
            if not files:
                raise self.error(missing(entry))
        counts = Counter(file.name for files in found for file in files)
        named: dict[str, Entry] = {}
        for number, files in enumerate(found):
            for file in files:
                # Only a name that several entries of the list share needs to say which entry is meant.
                named[file.name if counts[file.name] == 1 else f"{number}:{file.name}"] = file
        return dict(sorted(named.items()))

    def shards(self) -> Sequence[str]:
        return list(self.files)

    def read(self, shard: str, start: int, keep: Keep) -> Iterator[tuple[int, str]]:
        file = self.files[shard]
        try:
            with open_file(file) as stream:
                for row, texts in self._reader(file)(stream, self.config.columns(), start, keep):
                    text = self.document(texts)
                    if self.wanted(text):
                        assert text is not None
                        yield row, text
        except BadDataError as error:
            raise self.error(f"{file.path}{error.where}: {error.why}") from error
        except OSError as error:
            raise self.error(f"{file.path}: {error.strerror or error}") from error

    def document(self, texts: Texts) -> str | None:
        """What a row's texts are together; None where there is nothing to read."""
        raise NotImplementedError

    def _reader(self, file: Entry) -> Reader:
        reader = reader_of(file.path)
        if reader is None:
            raise self.error(f"{file.path} has none of the endings {', '.join(FORMATS)}")
        return reader

    def facts(self) -> list[Any]:
        return [*self.config.columns().values(), {name: file.size for name, file in self.files.items()}]

    def describe(self) -> str:
        size = size_text(sum(file.size for file in self.files.values()))
        return f"{', '.join(self.config.entries())}: {len(self.files):,} files, {size}"


class Files(FileSource):
    """A document is a row (jsonl, parquet) or the whole file (txt)."""

    class Config(FileSource.Config):
        type: Literal["files"] = "files"
        text_key: str = "text"
        """The key (jsonl) or column (parquet) that holds the text."""

        def columns(self) -> Columns:
            return {"text_key": self.text_key}

    identity = "files"

    def document(self, texts: Texts) -> str | None:
        return texts[0]


class Pairs(FileSource):
    """A better and a worse answer to the same prompt in each row (jsonl, parquet), for objective.type = "reward".

    A document is the JSON array of the three.
    """

    class Config(FileSource.Config):
        type: Literal["pairs"] = "pairs"
        holds_pairs: ClassVar[bool] = True
        prompt_key: str = "prompt"
        """The key (jsonl) or column (parquet) that holds the prompt; "" = both answers are whole texts."""
        chosen_key: str = "chosen"
        """That of the better answer."""
        rejected_key: str = "rejected"
        """That of the worse answer."""

        def columns(self) -> Columns:
            prompt = {"prompt_key": self.prompt_key} if self.prompt_key else {}
            return {**prompt, "chosen_key": self.chosen_key, "rejected_key": self.rejected_key}

        def problems(self, job: Job, world_size: int | None) -> Iterator[Problem]:
            yield from super().problems(job, world_size)
            seen: dict[str, str] = {}
            for setting, name in self.columns().items():
                if not name:
                    yield Problem(NOT_ALLOWED, f".{setting}", "names no key", name, f'such as "{setting[:-4]}"')
                elif name in seen:
                    why = f"is {seen[name]} too: each of a pair's texts has a key of its own"
                    yield Problem(NOT_ALLOWED, f".{setting}", why, name)
                seen.setdefault(name, setting)
            for entry in self.entries():
                if any(path.endswith(".txt") for path in [entry, *local_files(entry)]):
                    yield Problem(NOT_ALLOWED, ".path", "a .txt file holds no pairs", entry, ".jsonl or .parquet files")

    config: Config
    identity = "pairs"

    def document(self, texts: Texts) -> str | None:
        *prompt, chosen, rejected = texts
        if not chosen or not rejected:
            return None
        return json.dumps([prompt[0] or "" if prompt else "", chosen, rejected])


def missing(entry: str) -> str:
    """Why an entry without files is refused."""
    if not entry:
        return "an empty path"
    if glob.has_magic(entry):
        return f"no file matches {entry}"
    where = Path(os.path.expanduser(entry))
    return (
        f"the folder {where} holds no file ending in {', '.join(FORMATS)}" if where.is_dir() else f"there is no {where}"
    )


def local_files(entry: str) -> list[str]:
    """Paths of the files that a local entry stands for, sorted; of a folder only those with a known ending."""
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        return sorted(name for name in found if reader_of(name) is not None)
    if os.path.isfile(path):
        return [path]
    return (
        sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name)) if glob.has_magic(path) else []
    )


def list_files(entry: str) -> list[Entry]:
    """The files an entry stands for. Their names do not depend on where the data is stored: relative to the folder
    given, or to the fixed part of the glob, or just the file's name."""
    if "://" in entry:
        return list_remote_files(entry)
    root = fixed_folder(os.path.expanduser(entry), os.path.isdir(os.path.expanduser(entry)))
    return [
        Entry(Path(os.path.relpath(path, root)).as_posix(), path, os.path.getsize(path)) for path in local_files(entry)
    ]


def list_remote_files(url: str) -> list[Entry]:
    """`list_files` on an fsspec file system."""
    import fsspec.core

    filesystem, path = fsspec.core.url_to_fs(url)
    is_folder = not glob.has_magic(path) and filesystem.isdir(path)
    if is_folder:
        found = {name: info for name, info in filesystem.find(path, detail=True).items() if reader_of(name) is not None}
    elif glob.has_magic(path):
        found = {name: info for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"}
    else:
        found = {path: filesystem.info(path)} if filesystem.exists(path) else {}
    root = fixed_folder(path, is_folder)
    return [
        Entry(os.path.relpath(name, root), name, int(info["size"] or 0), filesystem)
        for name, info in sorted(found.items())
    ]


def fixed_folder(path: str, is_folder: bool) -> str:
    """The folder itself, or the folders before the first wildcard, or the file's folder."""
    if is_folder:
        return path
    fixed: list[str] = []
    for part in PurePosixPath(path).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return os.path.join(*fixed) if fixed else "."


def open_file(file: Entry) -> IO[bytes]:
    """The file's bytes as they are stored."""
    return open(file.path, "rb") if file.filesystem is None else file.filesystem.open(file.path, "rb")
