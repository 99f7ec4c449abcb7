"""Python's logging for one process of a run: torchtitan's prefix, colours on a terminal, one line per warning."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import TextIO

from rich.console import Console
from rich.text import Text

PREFIX = "[titan] %(asctime)s - %(name)s - %(levelname)s - %(message)s"
_LEVEL_STYLES = ((logging.ERROR, "red"), (logging.WARNING, "yellow"))

logger = logging.getLogger()


def setup_logging(rank: int, color: bool = True, stream: TextIO | None = None) -> None:
    """Sends the root logger to standard output on rank 0, and only errors, to standard error, on the others.

    Calling it again replaces what the first call set up.
    """
    stream = stream or (sys.stdout if rank == 0 else sys.stderr)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a path or text the terminal cannot show must not stop the run
    for handler in [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]:
        logger.removeHandler(handler)
    handler = ConsoleHandler(stream, color)
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    warnings.formatwarning = _one_line
    logging.captureWarnings(True)


class ConsoleHandler(logging.Handler):
    """Writes records through rich: plain where the stream is no terminal, never wrapped, flushed.

    A record may carry `fields`, pairs of style and text, which make up its message and are coloured one by one.
    """

    def __init__(self, stream: TextIO, color: bool = True) -> None:
        super().__init__()
        self.console = _Console(file=stream, color_system="auto" if color else None, highlight=False)
        self.setFormatter(logging.Formatter(PREFIX))
        self.addFilter(_is_shown)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(self._text(record), soft_wrap=True)
        except Exception:
            self.handleError(record)

    def _text(self, record: logging.LogRecord) -> Text:
        line = self.format(record)
        style = next((style for level, style in _LEVEL_STYLES if record.levelno >= level), "")
        text = Text(line, style)
        at = line.find(record.message)
        for style, field in getattr(record, "fields", ()):
            at = line.find(field, at)
            text.stylize(style, at, at + len(field))
            at += len(field)
        return text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Who watched has gone (`| head`); the run goes on and its files tell of it.
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _is_shown(record: logging.LogRecord) -> bool:
    """Our own records; of other libraries warnings and errors only."""
    ours = record.name == "root" or record.name.partition(".")[0] == "titan_lite"
    return ours or record.levelno >= logging.WARNING


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {' '.join(str(message).split())} ({filename}:{lineno})"
