"""Names, peaks, memory, determinism."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from titan_lite.run.determinism import seed_everything, set_deterministic
from titan_lite.run.device import Memory, device_name, native_bf16, peak_flops, read_memory

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2.25e15),
        ("AMD Instinct MI300X", 1300e12),
        ("AMD Instinct MI325X", 1300e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI355X", 2500e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
        ("AMD EPYC", None),
    ],
)
def test_peak_flops(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_cpu_has_a_name_and_no_peak() -> None:
    assert device_name(CPU)
    assert peak_flops(device_name(CPU)) is None


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="x86 Linux only")
def test_native_bf16_agrees_with_the_kernel() -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert native_bf16(CPU) == bool({"avx512_bf16", "amx_bf16"} & set(flags))


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux only")
def test_cpu_memory_is_the_peak_of_this_process_not_of_its_parent() -> None:
    # A parent with a large peak, as a launcher might be, starts the process that reads its memory.
    child = "import torch; from titan_lite.run.device import read_memory; m = read_memory(torch.device('cpu'));"
    child += "x = torch.ones(64 * 2**20); print(m.reserved_gib, read_memory(torch.device('cpu')).reserved_gib)"
    parent = f"import subprocess, sys; x = b'1' * 800_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    result = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(float, result.stdout.split())
    assert before < 0.6
    assert after - before == pytest.approx(0.25, abs=0.02)


def test_memory_percent() -> None:
    memory = read_memory(CPU)
    assert 0 < memory.percent(memory.reserved_gib) < 100
    assert Memory(2.0, 8.0).percent(2.0) == 25.0


def test_seed_everything_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), torch.rand(()).item()

    seed_everything(2**40 + 1)
    first = draw()
    assert draw() != first
    seed_everything(2**40 + 1)
    assert draw() == first


@pytest.fixture
def restore_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


@pytest.mark.usefixtures("restore_determinism")
def test_deterministic_mode_refuses_or_warns() -> None:
    def put() -> None:  # has no deterministic implementation
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)

    put()
    set_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        put()
    set_deterministic(warn_only=True)
    with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
        put()
