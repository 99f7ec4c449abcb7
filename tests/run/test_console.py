"""What a person sees: exact lines, colours, who prints what."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.facts import logged_step, logged_validation, run_facts
from titan_lite.run.console import ConsoleSink, end_line, format_count, format_seconds
from titan_lite.run.device import Memory
from titan_lite.run.logging import ConsoleHandler, setup_logging
from titan_lite.run.sink import Totals

PREFIX = r"\[titan\] \d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - root - INFO - "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, form = root.handlers[:], root.level, warnings.formatwarning
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    yield
    logging.captureWarnings(False)
    root.handlers[:], warnings.formatwarning = handlers, form
    root.setLevel(level)


def shown(rank: int = 0, terminal: bool = False, color: bool = True) -> io.StringIO:
    stream = Terminal() if terminal else io.StringIO()
    setup_logging(rank, color, stream)
    return stream


def test_step_line_exactly() -> None:
    stream = shown()
    ConsoleSink().step(logged_step())
    line = (
        "step: 10  loss: 4.72150  grad_norm: 0.2804  memory: 1.23GiB(5.12%)  tps: 5,847  tflops: 0.12  mfu: n/a  "
        "eta: 0:12:30\n"
    )
    assert re.fullmatch(PREFIX + re.escape(line), stream.getvalue())


def test_step_line_of_a_known_gpu() -> None:
    stream = shown()
    memory = Memory(reserved_gib=49.66, capacity_gib=95.0)
    ConsoleSink().step(logged_step(800, tflops=1338.65, mfu=0.34237, memory=memory, eta_seconds=100 * 3600))
    assert "memory: 49.66GiB(52.27%)  tps: 5,847  tflops: 1,338.65  mfu: 34.24%  eta: 100:00:00" in stream.getvalue()


def test_validation_line_exactly() -> None:
    stream = shown()
    ConsoleSink().validation(logged_validation())
    line = "validate step: 100  loss: 2.12346  bits_per_byte: 3.06350  memory: 1.23GiB(5.12%)  tps: 12,346\n"
    assert re.fullmatch(PREFIX + re.escape(line), stream.getvalue())


def test_a_terminal_gets_torchtitans_colours() -> None:
    stream = shown(terminal=True)
    ConsoleSink().step(logged_step())
    coloured = stream.getvalue()
    assert "\x1b[31mstep: 10\x1b[0m  \x1b[32mloss: 4.72150\x1b[0m  " in coloured
    assert "\x1b[35mmfu: n/a\x1b[0m" in coloured
    plain = shown()
    ConsoleSink().step(logged_step())
    strip = re.compile(r"\x1b\[[\d;]*m|\d\d:\d\d:\d\d,\d{3}")
    assert strip.sub("", coloured) == strip.sub("", plain.getvalue())


def test_colours_can_be_disabled() -> None:
    stream = shown(terminal=True, color=False)
    ConsoleSink().step(logged_step())
    logging.warning("careful")
    assert "\x1b" not in stream.getvalue()


def test_memory_trouble_is_said() -> None:
    stream = shown()
    ConsoleSink().step(logged_step(memory=Memory(1.0, 2.0, 1.0, alloc_retries=3, ooms=0)))
    assert "WARNING - 3 allocation retries" in stream.getvalue()


def test_facts(tmp_path: Path) -> None:
    stream = shown()
    folder = tmp_path / ("long" * 60)
    ConsoleSink().start(run_facts(folder, start_step=120, resumed_from="step-120", warnings=("old key", "[b]")))
    text = stream.getvalue()
    assert text.startswith("[titan]")
    assert "WARNING - old key" in text
    assert "WARNING - [b]\n" in text  # not markup
    assert "6,163,456 parameters (6,032,384 without embedding), 41.2 MFLOPs per token" in text
    assert "FSDP 2; 2 x NVIDIA A100-SXM4-80GB, peak 3.120e+14 FLOP/s" in text
    assert "32 x 512 = 16,384 tokens per step (local batch 8 x data parallel 2 x accumulation 2)" in text
    assert "400 (6.55 Mtokens), starting at step 121" in text
    assert f"  writes   {folder}\n" in text  # not wrapped
    assert "  resumes  step-120\n" in text


def test_facts_without_a_known_peak(tmp_path: Path) -> None:
    stream = shown()
    ConsoleSink().start(run_facts(tmp_path, peak_flops=None))
    assert "peak unknown, so no MFU" in stream.getvalue()
    assert "resumes" not in stream.getvalue()


def test_checkpoint_line(tmp_path: Path) -> None:
    stream = shown()
    ConsoleSink().checkpoint(100, tmp_path / "step-100", 0.4187)
    assert f"Checkpoint of step 100: training waited 0.42 seconds for {tmp_path}/step-100\n" in stream.getvalue()


def test_end_line() -> None:
    totals = Totals("completed", 400, 6_553_600, 123.4, 26_640.2, logged_step(400), logged_validation(400))
    assert end_line(totals) == (
        "Training completed  400 steps and 6,553,600 tokens in 0:02:03  tps: 26,640  loss: 4.72150  "
        "validation loss: 2.12346 (3.06350 bits per byte)"
    )
    nothing = replace(totals, reason="failed: OSError", steps=0, tokens=0, last=None, validation=None)
    assert end_line(nothing) == "Training failed: OSError  0 steps and 0 tokens in 0:02:03  tps: 26,640"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (750, "0:12:30"), (3599.5, "1:00:00"), (90061, "25:01:01")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 "), (999, "999 "), (1234, "1.23 k"), (4.1e7, "41 M"), (6e9, "6 G"), (2.5e15, "2.5 P")]
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


def test_setting_up_twice_prints_once() -> None:
    shown()
    stream = shown()
    logging.info("once")
    assert stream.getvalue().count("once") == 1
    assert sum(isinstance(handler, ConsoleHandler) for handler in logging.getLogger().handlers) == 1


def test_other_ranks_show_only_errors() -> None:
    stream = shown(rank=1)
    ConsoleSink().step(logged_step())
    warnings.warn("w", stacklevel=1)
    logging.error("rank 1 is lost")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("root - ERROR - rank 1 is lost")


def test_other_libraries_show_only_warnings() -> None:
    stream = shown()
    library = logging.getLogger("some_library")
    library.info("chatter")
    library.warning("trouble")
    logging.getLogger("titan_lite.data").info("ours")
    assert [line.partition(" - ")[2] for line in stream.getvalue().splitlines()] == [
        "some_library - WARNING - trouble",
        "titan_lite.data - INFO - ours",
    ]


def test_a_python_warning_is_one_line() -> None:
    stream = shown()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings put the plain printer back
        warnings.showwarning("two\n   lines", UserWarning, "file.py", 3)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("py.warnings - WARNING - UserWarning: two lines (file.py:3)")


def test_a_path_that_cannot_be_encoded_does_not_stop_the_run() -> None:
    raw = io.BytesIO()
    setup_logging(0, True, io.TextIOWrapper(raw, encoding="ascii"))
    (handler,) = (each for each in logging.getLogger().handlers if isinstance(each, ConsoleHandler))
    # To this handler alone: pytest would send what its own keeps to the process that reports, which cannot encode it.
    handler.handle(logging.LogRecord("root", logging.INFO, __file__, 0, "writes to \udcff and é", None, None))
    assert raw.getvalue().rstrip().endswith(rb"writes to \udcff and \xe9")


def test_a_reader_that_leaves_does_not_stop_the_run() -> None:
    program = (
        "import logging, sys\n"
        "from titan_lite.run.logging import setup_logging\n"
        "setup_logging(0)\n"
        "for i in range(20000): logging.info('line %d', i)\n"
        "print('reached the end', file=sys.stderr)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout
        assert process.stderr
        assert b"line 0" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"reached the end\n"
        assert process.wait() == 0
