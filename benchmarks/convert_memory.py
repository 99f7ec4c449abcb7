"""Peak memory and speed of scripts/convert_to_hf.py on a synthetic checkpoint of several GB, beside a plain copy.

    python benchmarks/convert_memory.py [--gigabytes 4] [--max-shard-size 500MB] [--dtype bfloat16] [--rounds 3]

The checkpoint is a Llama in float32, written piece by piece. Each conversion is a process of its own, run with
--no-verify (a comparison holds both models), whose peak is what the system counted as resident. The bound is 1.5 times
the largest file plus 1 GiB. A plain copy reads and writes the checkpoint's bytes and makes them durable, as a
conversion does; the two alternate within a round.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, spread
from titan_lite.checkpoint.folder import find_checkpoint
from titan_lite.config.load import job_from_dict
from titan_lite.hf.folds import Shape
from titan_lite.hf.importer import write_step_zero
from titan_lite.hf.source import Place

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_to_hf.py"
VOCAB, DIM, HIDDEN = 64_000, 2048, 8192
LAYER = 4 * DIM * DIM + 3 * DIM * HIDDEN
"""Parameters of a layer, nearly."""
TINY = 32
"""Width of the model with hardly any."""


class Random:
    """Tensors of random values, the same over and over, that are made when they are read."""

    def __init__(self, meta: dict[str, Tensor]):
        self.meta = meta
        self.values = torch.randn(2**20)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape = self.meta[name].shape
        rows = (shape[0] if stop is None else min(stop, shape[0])) - start
        size = rows * math.prod(shape[1:])
        return self.values.repeat(-(-size // len(self.values)))[:size].view(rows, *shape[1:])

    def place(self, name: str) -> Place | None:
        return None


def layers_for(gigabytes: float) -> int:
    """Layers of a model of about this size."""
    return max(1, round((gigabytes * 1e9 / 4 - 2 * VOCAB * DIM) / LAYER))


def make_checkpoint(folder: Path, n_layers: int, dim: int = DIM, hidden: int = HIDDEN) -> Path:
    """A step folder."""
    tables = {
        "dim": dim,
        "n_layers": n_layers,
        "vocab_size": VOCAB,
        "attention": {"n_heads": 16},
        "ffn": {"hidden": hidden},
    }
    job = job_from_dict({"model": tables})
    (folder / "checkpoint").mkdir(parents=True)
    shape = Shape.of(job.model, VOCAB, job.training.seq_len)
    fingerprint = job.tokenizer.build().fingerprint()
    write_step_zero(folder / "checkpoint" / "step-0", Random(dict(shape.meta)), job, fingerprint, "llama")
    return find_checkpoint(folder)


def convert(step: Path, out: Path, options: list[str]) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak resident bytes of one conversion."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(step), str(out), "--no-verify", *options])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the conversion failed with exit code {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def copy(step: Path, out: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of a plain durable copy."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    out.mkdir()
    for file in step.iterdir():
        shutil.copyfile(file, out / file.name)
        with open(out / file.name, "rb") as written:
            os.fsync(written.fileno())
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint")
    parser.add_argument("--max-shard-size", default="500MB")
    parser.add_argument("--dtype", default="", help="of the result; the checkpoint's by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    arguments = parser.parse_args()
    print(machine())
    options = ["--max-shard-size", arguments.max_shard_size]
    options += ["--dtype", arguments.dtype] if arguments.dtype else []
    base = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        n_layers = layers_for(arguments.gigabytes)
        step = make_checkpoint(base / "run", n_layers)
        tiny = make_checkpoint(base / "tiny", n_layers, TINY, TINY)
        size = sum(file.stat().st_size for file in step.iterdir())
        print(f"checkpoint of {size / 1e9:.2f} GB, files of at most {arguments.max_shard_size}")
        converted, copied, idle, peaks, cpu = [], [], [], [], []
        largest = 0
        for number in range(arguments.rounds):
            seconds, work, peak = convert(step, base / "hf", options)
            largest = max(file.stat().st_size for file in (base / "hf").glob("*.safetensors"))
            shutil.rmtree(base / "hf")
            plain, plain_work = copy(step, base / "copy")
            shutil.rmtree(base / "copy")
            without, without_work, _ = convert(tiny, base / "hf", options)
            shutil.rmtree(base / "hf")
            told = f"conversion {seconds:.2f} s, of {without:.2f} without weights, copy {plain:.2f} s"
            print(f"round {number + 1}: {told}, peak {peak / 2**30:.2f} GiB")
            converted.append(seconds - without)
            copied.append(plain)
            idle.append(without)
            cpu.append((work - without_work, plain_work))
            peaks.append(peak)
        bound = 1.5 * largest + 2**30
        ratio = statistics.median(b / a for a, b in zip(converted, copied, strict=True))
        print(f"peak resident {max(peaks) / 2**30:.2f} GiB; bound {bound / 2**30:.2f} GiB")
        print(f"seconds: conversion {spread(converted)} beyond {spread(idle)}; copy {spread(copied)}")
        print(f"speed {ratio:.2f} of a copy")
        both = [spread([pair[i] for pair in cpu]) for i in (0, 1)]
        print(f"CPU seconds: conversion {both[0]} beyond; copy {both[1]}")
        if max(peaks) > bound:
            raise SystemExit("the conversion took more memory than it may")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
