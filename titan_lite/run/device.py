"""What the device is and can do: name, peak FLOP/s, native bfloat16, peak memory."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 1024**3

_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    # Dense bf16 tensor FLOP/s from the vendors' data sheets (halved where they quote sparsity); first match wins.
    (r"A100", 312e12),
    (r"H100.*NVL", 835e12),
    (r"H100.*PCIe", 756e12),
    (r"H100", 989e12),
    (r"H200", 989e12),
    (r"H20", 148e12),
    (r"B200", 2.25e15),
    (r"MI300X|MI325X", 1300e12),
    (r"MI250X", 191.5e12),  # one of its two dies, which is one device to torch
    (r"MI355X", 2500e12),
    (r"RTX 3090(?! Ti)", 71e12),
    (r"RTX 4090(?! D| Laptop)", 165.2e12),
)


def device_name(device: torch.device) -> str:
    """The maker's name of the device, such as "NVIDIA H100 80GB HBM3" or "AMD EPYC"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return names[1].strip() if names else platform.processor() or platform.machine()


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of one device of this name; None where unknown, as for every CPU."""
    if "MIG" in name:  # a slice of the card, of unknown size
        return None
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(rf"\b(?:{pattern})\b", name)), None)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; a CPU that cannot is 8 to 35 times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@dataclass(frozen=True)
class Memory:
    """Peak memory since the last `reset_peak_memory` (of the whole process on a CPU)."""

    reserved_gib: float
    """Held by the allocator on CUDA; peak resident set of this process on a CPU."""
    capacity_gib: float
    """Of the card on CUDA; all RAM of the machine on a CPU."""
    active_gib: float | None = None
    alloc_retries: int | None = None
    ooms: int | None = None

    def percent(self, gib: float) -> float:
        return 100 * gib / self.capacity_gib


def read_memory(device: torch.device) -> Memory:
    """The device's peak memory, without waiting for the device."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return Memory(
            reserved_gib=stats.get("reserved_bytes.all.peak", 0) / GIB,
            capacity_gib=torch.cuda.get_device_properties(device).total_memory / GIB,
            active_gib=stats.get("active_bytes.all.peak", 0) / GIB,
            alloc_retries=stats.get("num_alloc_retries", 0),
            ooms=stats.get("num_ooms", 0),
        )
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Memory(reserved_gib=_peak_resident_bytes() / GIB, capacity_gib=ram / GIB)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new window of peak memory; a CPU keeps the peak of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_resident_bytes() -> int:
    # On Linux getrusage's maximum survives exec, so a worker would report its launcher's peak: read the process's own.
    try:
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        peak = None
    if peak:
        return int(peak[1]) * 1024
    import resource  # not on Windows, which has neither this nor /proc

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
