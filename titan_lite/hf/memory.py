"""How much memory this process may take."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MEMINFO: Final = Path("/proc/meminfo")
GROUP: Final = Path("/sys/fs/cgroup")
LIMITS: Final = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of a container's limit and of what it has taken, in both versions of control groups."""


def available_memory() -> int | None:
    """Bytes that can be taken without swapping and within the container's limit; None where the system does not say."""
    found = [_number(GROUP / limit) - _number(GROUP / taken) for limit, taken in LIMITS if _number(GROUP / limit)]
    if MEMINFO.is_file():
        table = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(int(table["MemAvailable"].split()[0]) * 1024)
    return min(found, default=None)


def _number(path: Path) -> int:
    """The number in a file; 0 where there is none."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else 0
