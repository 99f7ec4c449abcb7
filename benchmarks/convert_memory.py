"""Peak memory and speed of scripts/convert_to_hf.py on a synthetic checkpoint of several GB, beside a plain copy.

    python benchmarks/convert_memory.py [--gigabytes 4] [--max-shard-size 500MB] [--dtype bfloat16] [--rounds 3]

The checkpoint is a Llama in float32, written piece by piece. One conversion is a process of its own, run with
--no-verify (a comparison holds a model), whose peak is what the system counted as resident. The bound is 1.5 times the
largest file plus 1 GiB. For the speed, conversions in this process take turns with plain copies, which read and write
the checkpoint's bytes and make them durable as a conversion does, and with conversions of a model of that vocabulary
with hardly any weights, which is what configs and tokenizer take.
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
from titan_lite.hf.export import export
from titan_lite.hf.folds import Shape
from titan_lite.hf.importer import write_step_zero
from titan_lite.hf.shards import parse_size
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


def peak_memory(step: Path, out: Path, options: list[str]) -> int:
    """Peak resident bytes of one conversion in a process of its own."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(step), str(out), "--no-verify", *options])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the conversion failed with exit code {process.returncode}")
    return usage.ru_maxrss * 1024


def convert(step: Path, out: Path, dtype: str, shard_size: int) -> tuple[float, float]:
    """Seconds and CPU seconds of one conversion in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    export(step, out, dtype, verified=False, shard_size=shard_size)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds, cpu


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
        peak = peak_memory(step, base / "hf", options)
        bound = 1.5 * max(file.stat().st_size for file in (base / "hf").glob("*.safetensors")) + 2**30
        shutil.rmtree(base / "hf")
        print(f"peak resident {peak / 2**30:.2f} GiB; bound {bound / 2**30:.2f} GiB")
        if peak > bound:
            raise SystemExit("the conversion took more memory than it may")
        given = arguments.dtype, parse_size(arguments.max_shard_size)
        convert(tiny, base / "hf", *given)  # imports
        converted, copied, cpu = [], [], []
        for number in range(arguments.rounds):
            seconds, work = convert(step, base / "hf", *given)
            plain, plain_work = copy(step, base / "copy")
            shutil.rmtree(base / "copy")
            without, without_work = convert(tiny, base / "hf", *given)
            print(f"round {number + 1}: conversion {seconds:.2f} s, {without:.2f} without weights, copy {plain:.2f} s")
            converted.append(seconds - without)
            copied.append(plain)
            cpu.append((work - without_work, plain_work))
        ratio = statistics.median(b / a for a, b in zip(converted, copied, strict=True))
        print(f"seconds: conversion {spread(converted)}, copy {spread(copied)}; speed {ratio:.2f} of a copy")
        both = [spread([pair[i] for pair in cpu]) for i in (0, 1)]
        print(f"CPU seconds: conversion {both[0]}, copy {both[1]}")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
