"""The running Python's standard library as a corpus: real text on every machine, nothing to download."""

from __future__ import annotations

import logging
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from titan_lite.data.source import Keep, Source, size_text

logger = logging.getLogger(__name__)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class PythonStdlib(Source):
    """One document and one shard per .py file, sorted by path, without installed packages and tests."""

    class Config(Source.Config):
        type: Literal["python_stdlib"] = "python_stdlib"

    identity = "python_stdlib"

    @cached_property
    def root(self) -> Path:
        return Path(sysconfig.get_path("stdlib"))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """{path below the library's folder: bytes}, sorted."""
        found: dict[str, int] = {}
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for name in names:
                path = Path(folder, name)
                if path.suffix == ".py" and path.is_file():
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        if not found:
            raise self.error(f"this Python has no standard library sources at {self.root}")
        return dict(sorted(found.items()))

    def shards(self) -> Sequence[str]:
        return list(self.sizes)

    def read(self, shard: str, start: int, keep: Keep) -> Iterator[tuple[int, str]]:
        if start > 0 or not keep(0):
            return
        try:
            text = (self.root / shard).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            self.dropped += 1
            logger.warning("python_stdlib: %s is left out: %s", shard, error)
            return
        if self.wanted(text):
            yield 0, text

    def facts(self) -> list[Any]:
        return [platform.python_version(), self.sizes]

    def describe(self) -> str:
        version, size = platform.python_version(), size_text(sum(self.sizes.values()))
        return f"python_stdlib {version}: {len(self.sizes):,} files, {size}"
