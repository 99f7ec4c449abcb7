"""File formats: how (row, text) is read from a stream of bytes. A fault is named with its line, never patched over."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from titan_lite.data.source import Keep

Columns = Mapping[str, str]
"""{setting: the key (jsonl) or column (parquet) that it names}; errors name both."""
Texts = tuple["str | None", ...]
"""What a row has in each of them: a text, or None for a null."""
Reader = Callable[[IO[bytes], Columns, int, Keep], Iterator[tuple[int, Texts]]]
"""(stream, columns, first row, wanted rows) -> (row, texts)."""

_CHUNK = 1 << 20
_PARQUET_ROWS = 256


class BadDataError(Exception):
    """A file that is not what it should be; `where` is ", line 12" or "" and goes behind the file's name."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(where, why)
        self.where = where
        self.why = why


def read_txt(stream: IO[bytes], columns: Columns, start: int, keep: Keep) -> Iterator[tuple[int, Texts]]:
    """The whole file as row 0, line ends as they are."""
    if start == 0 and keep(0):
        content = stream.read()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise BadDataError(f", line {line}", f"not UTF-8 (byte {error.start}: {error.reason})") from error
        yield 0, (text,)


def read_jsonl(stream: IO[bytes], columns: Columns, start: int, keep: Keep) -> Iterator[tuple[int, Texts]]:
    """One JSON object per line; row n is line n + 1. A blank line counts as a document without text."""
    for row, line in enumerate(stream):
        if row >= start and keep(row):
            yield row, parse_line(line, row, columns)


def read_jsonl_gz(stream: IO[bytes], columns: Columns, start: int, keep: Keep) -> Iterator[tuple[int, Texts]]:
    """gzip, one or more members, checksums verified."""
    rows = 0
    try:
        with gzip.open(stream, "rb") as lines:
            for row, line in enumerate(lines):
                rows = row + 1
                if row >= start and keep(row):
                    yield row, parse_line(line, row, columns)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadDataError(f", after line {rows}", f"damaged gzip data: {error}") from error


def read_jsonl_zst(stream: IO[bytes], columns: Columns, start: int, keep: Keep) -> Iterator[tuple[int, Texts]]:
    """Zstandard, one or more frames."""
    lines = io.BufferedReader(_ZstdStream(stream))
    rows = 0
    try:
        for row, line in enumerate(lines):
            rows = row + 1
            if row >= start and keep(row):
                yield row, parse_line(line, row, columns)
    except _ZstdDamagedError as error:
        raise BadDataError(f", after line {rows}", f"damaged zstd data: {error}") from error


def read_parquet(stream: IO[bytes], columns: Columns, start: int, keep: Keep) -> Iterator[tuple[int, Texts]]:
    """One document per row; page checksums are verified where the file has them."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        names = list(columns.values())
        for setting, name in columns.items():
            check_column(file.schema_arrow, setting, name)
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row + size <= start:
                row += size
                continue
            batches = file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=names, use_threads=False)
            for batch in batches:
                for cells in zip(*(batch.column(name) for name in names), strict=True):
                    if row >= start and keep(row):
                        yield row, tuple(cell.as_py() for cell in cells)
                    row += 1
    except UnicodeDecodeError as error:
        raise BadDataError(f", row {row}", f"not UTF-8: {error.reason}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise BadDataError(f", after row {row}" if row else "", f"damaged parquet data: {error}") from error


FORMATS: dict[str, Reader] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl_gz,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
}


def reader_of(path: str) -> Reader | None:
    """The reader for a file's ending."""
    return next((reader for ending, reader in FORMATS.items() if path.endswith(ending)), None)


def parse_line(line: bytes, row: int, columns: Columns) -> Texts:
    """The texts of one JSON line; None for a null and for a blank line."""
    if not line.strip():
        return (None,) * len(columns)
    where = f", line {row + 1}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadDataError(where, f"not UTF-8 (byte {error.start} of the line: {error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise BadDataError(where, f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadDataError(where, f"expected a JSON object, got {kind(record)}")
    return tuple(text_of(record, key, where, setting) for setting, key in columns.items())


def text_of(record: dict[str, Any], key: str, where: str, setting: str = "text_key") -> str | None:
    """The text that a row has at a key, which a setting names."""
    if key not in record:
        raise BadDataError(where, f"there is no key {key!r} ({setting}) among {listed(record)}")
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise BadDataError(where, f"{key!r} should be a string, got {kind(text)}")
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadDataError(
                where, f"{key!r} holds half a surrogate pair (character {error.start}), no text"
            ) from error
    return text


def check_column(schema: Any, setting: str, name: str) -> None:
    """Refuses a parquet file without a column of strings of this name."""
    import pyarrow

    if name not in schema.names:
        raise BadDataError("", f"there is no column {name!r} ({setting}) among {listed(schema.names)}")
    column = schema.field(name).type
    if pyarrow.types.is_dictionary(column):
        column = column.value_type
    strings = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
        pyarrow.types.is_null,
    )
    if not any(is_kind(column) for is_kind in strings):
        raise BadDataError("", f"the column {name!r} should hold strings, it holds {column}")


def kind(value: Any) -> str:
    """JSON's name of a value's type."""
    names = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def listed(names: Iterable[str]) -> str:
    """A few names for an error message."""
    names = [repr(name) for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"


class _ZstdDamagedError(Exception):
    pass


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes. The library's own stream takes a file cut inside a frame for a whole one; this does not."""

    def __init__(self, source: IO[bytes]) -> None:
        import zstandard

        self._source = source
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._rest or self._source.read(_CHUNK)
            self._rest = b""
            if not compressed:
                if self._frame is not None:
                    raise _ZstdDamagedError("the file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._error as error:
                raise _ZstdDamagedError(str(error)) from error
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n
