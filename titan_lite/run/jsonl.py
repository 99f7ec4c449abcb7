"""`metrics.jsonl`: one flushed line per logged step, validation pass and comparison, for programs to read."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import BinaryIO

from titan_lite.run.hooks import RunFacts
from titan_lite.run.sink import LoggedComparison, LoggedStep, LoggedValidation, Sink, Totals

logger = logging.getLogger(__name__)


class JsonLines(Sink):
    """Appends to `path`. Numbers are unrounded; what is not a number (NaN, infinity, an unknown MFU) is null.

    A resumed run first removes the lines after the step it resumes from. A run that starts anew where lines lie already
    (an earlier one left no checkpoint) moves them aside. A write that fails, say on a full disk, is reported, leaves no
    half line, and is made up for with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._pending = b""

    def start(self, facts: RunFacts) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if facts.start_step:
            keep_until(self.path, facts.start_step)
        elif self.path.exists() and self.path.stat().st_size:
            _move_aside(self.path)
        self._file = self.path.open("ab", buffering=0)

    def step(self, row: LoggedStep) -> None:
        fields: dict[str, float | None] = {
            "step": row.step,
            "loss": row.loss,
            "grad_norm": row.grad_norm,
            "lr": row.lr,
            "tokens_seen": row.tokens_seen,
            "tokens_per_second": row.tokens_per_second,
            "mfu": row.mfu,
            "memory_gib": row.memory.reserved_gib,
            "data_seconds": row.data_seconds,
            "step_seconds": row.step_seconds,
        }
        assert not fields.keys() & row.extra.keys(), f"extra metrics {sorted(row.extra)} hide the line's own keys"
        self._write({**fields, **row.extra})

    def validation(self, row: LoggedValidation) -> None:
        numbers = {"loss": row.loss, "bits_per_byte": row.bits_per_byte, **row.extra}
        self._write({"step": row.step, **{f"validation_{name}": value for name, value in numbers.items()}})

    def comparison(self, row: LoggedComparison) -> None:
        costs = {"measured": row.measured, "estimated": row.estimated}
        fields = {f"{which}_{name}": value for which, cost in costs.items() for name, value in vars(cost).items()}
        self._write({"step": row.step, **fields})

    def end(self, totals: Totals) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, fields: dict[str, float | None]) -> None:
        numbers = {key: value if value is None or math.isfinite(value) else None for key, value in fields.items()}
        self._pending += json.dumps(numbers, allow_nan=False).encode() + b"\n"
        assert self._file is not None, "a sink is started before it is written to"
        good = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(self._pending)
            if written != len(self._pending):
                raise OSError(f"only {written} of {len(self._pending)} bytes fitted")
        except OSError as error:
            self._file.truncate(good)
            logger.error("%s: %s; its lines are kept in memory and written with the next one", self.path, error)
        else:
            self._pending = b""


def keep_until(path: Path, step: int) -> None:
    """Removes the lines after `step`, and what is no line (a half-written end), in one atomic replacement."""
    if not path.exists():
        return
    kept, dropped = [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        line_step = _step_of(line)
        if line_step is None and number < len(lines):
            logger.warning("%s:%d is not a line of metrics; removed", path, number)
        if line_step is not None and line_step <= step:
            kept.append(line)
        else:
            dropped += 1
    if not dropped:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None of anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def _move_aside(path: Path) -> None:
    number = 1
    while (old := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(old)
    logger.warning("%s: lines of an earlier run moved to %s", path, old.name)
