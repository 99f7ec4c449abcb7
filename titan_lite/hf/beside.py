"""New folders, which get their name when they are finished."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_lite.config.errors import ConfigError
from titan_lite.hf.errors import ConversionError


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` under a temporary name, which is removed unless it was renamed.

    What conversions to `out` left that were killed is removed as well. ConfigError where no folder can be made,
    ConversionError for an OSError.
    """
    prefix = f".{out.name}.tmp-"
    folder = out.absolute().with_name(f"{prefix}{uuid.uuid4().hex[:12]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(folder.parent, prefix)
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError.at(str(out), f"cannot be made: {error.strerror}") from None
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    except OSError as error:
        raise ConversionError(f"{out} was not made: {error}") from error
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(parent: Path, prefix: str) -> None:
    """Removes the folders that no process holds any more."""
    for left in parent.iterdir():
        if left.name.startswith(prefix) and left.is_dir():
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # a conversion that is running, or a file system that cannot tell
            finally:
                os.close(lock)
            shutil.rmtree(left)
