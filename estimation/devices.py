"""What devices have: memory, speed, and links to others. From the makers' data sheets; nothing here was measured."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

import torch

from titan_lite.config.errors import NOT_ALLOWED, ConfigError
from titan_lite.run.device import peak_flops

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Rates are per second and in one direction."""

    name: str
    memory_gib: float
    """What torch reports as the whole."""
    bf16: float
    """FLOP/s of dense matrix products."""
    fp32: float
    """FLOP/s without tensor cores, which torch does not use for float32 by default."""
    bandwidth: float
    """Bytes to and from its memory."""
    link: float
    """Bytes to other devices of its node."""
    float8: float = 0.0
    """FLOP/s of dense products of float8 matrices; 0 = the device has none."""
    host_link: float = 64e9
    """Bytes to and from host memory."""
    nic: float = 50e9
    """Bytes to other nodes: a 400 Gbit/s adapter for each device."""
    per_node: int = 8

    @property
    def is_cpu(self) -> bool:
        """Whether it runs operations as this machine does."""
        return self.name == "cpu"

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrices of `dtype`; those of float8 are computed in bfloat16 where the device has no float8."""
        if dtype.itemsize == 1 and dtype.is_floating_point:
            return self.float8 or self.bf16
        return self.bf16 if dtype in (torch.bfloat16, torch.float16) else self.fp32


def _device(
    name: str,
    maker: str,
    memory_gib: float,
    fp32: float,
    bandwidth: float,
    link: float,
    float8: bool = True,
    host_link: float = 64e9,
) -> Device:
    bf16 = peak_flops(maker)
    assert bf16 is not None
    return Device(name, memory_gib, bf16, fp32, bandwidth, link, 2 * bf16 if float8 else 0.0, host_link)


_TABLE = {
    device.name: device
    for device in (
        _device("a100-40gb", "A100", 39.4, 19.5e12, 1.555e12, 300e9, float8=False, host_link=32e9),
        _device("a100-80gb", "A100", 79.2, 19.5e12, 2.039e12, 300e9, float8=False, host_link=32e9),
        _device("h100-80gb", "H100", 79.1, 67e12, 3.35e12, 450e9),
        _device("h100-96gb", "H100", 95.0, 67e12, 3.35e12, 450e9),
        _device("h100-pcie", "H100 PCIe", 79.1, 51e12, 2.0e12, 64e9),
        _device("h100-nvl", "H100 NVL", 93.1, 60e12, 3.9e12, 64e9),
        _device("h200-141gb", "H200", 139.8, 67e12, 4.8e12, 450e9),
        _device("b200", "B200", 178.3, 75e12, 7.7e12, 900e9),
        _device("mi300x", "MI300X", 192.0, 163.4e12, 5.3e12, 448e9),
        _device("rtx3090", "RTX 3090", 23.6, 35.6e12, 0.936e12, 32e9, float8=False, host_link=32e9),
        _device("rtx4090", "RTX 4090", 23.5, 82.6e12, 1.008e12, 32e9, host_link=32e9),
    )
}
NAMES = (*_TABLE, "cpu")


def device_of(name: str) -> Device:
    """The device of this name, or of the one torch gives it; ConfigError with all names for another one."""
    if name == "cpu":
        return _this_machine()
    name = _named_by_torch(name) or name
    if name not in _TABLE:
        raise ConfigError.at("--device", "is not in the table", name, ", ".join(NAMES), code=NOT_ALLOWED)
    return _TABLE[name]


def _named_by_torch(name: str) -> str | None:
    """Such as "h100-80gb" for "NVIDIA H100 80GB HBM3"."""
    peak, size = peak_flops(name), re.search(r"(\d+) ?GB", name)
    squeezed = name.lower().replace(" ", "")
    alike = [device.name for device in _TABLE.values() if device.bf16 == peak]
    alike = [each for each in alike if each.partition("-")[0] in squeezed]
    sized = [each for each in alike if size and each.endswith(f"-{size[1]}gb")]
    return next(iter(sized or alike), None)


def _this_machine() -> Device:
    """Rates of one process on this machine's CPU, measured now."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    a = torch.ones(768, 768)
    flops = 2 * 768**3 / _fastest(lambda: a @ a)
    source = torch.ones(2**22)
    bandwidth = 2 * source.nbytes / _fastest(lambda: source.clone())
    return Device("cpu", ram, flops, flops, bandwidth, bandwidth, bandwidth)


def _fastest(run: object) -> float:
    """Seconds in which this thread worked: other processes may keep the cores busy meanwhile."""
    assert callable(run)
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)
