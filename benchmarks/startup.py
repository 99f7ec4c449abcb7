"""CPU seconds from the command to the first finished step of train_configs/debug.toml, beyond `import torch`.

    python benchmarks/startup.py [--rounds 3] [--section.key=value ...]

Counted is user + system time of the launcher, its worker and the data workers until the console shows "step: 1": all
imports, reading and checking the config (twice: launcher and worker), the data source, the model, the validation pass
before the first step where the config asks for one, and the step. Each round measures a bare `import torch`, the run as
it is, and the run without validation, so that drift hits all alike. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import machine, spread

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "train_configs" / "debug.toml"
FIRST_STEP = b"step: 1  "
TICKS = os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(root: int) -> float:
    """User + system seconds of process `root`, its living descendants, and the dead that any of them has waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # The second field is the name in parentheses, which may hold anything; the rest is plain.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    tree, grew = {root}, True
    while grew:
        found = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= found
        grew = bool(found)
    return sum(ticks.get(pid, 0) for pid in tree) / TICKS


def import_torch() -> float:
    """CPU seconds of `python -c "import torch"`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(overrides: list[str]) -> float:
    """CPU seconds of a fresh run until its first step is on the console; then the run is killed."""
    with tempfile.TemporaryDirectory(prefix="startup-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "titan_lite.launch", str(CONFIG), f"--job.dump_folder={folder}", *overrides]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        output = b""
        for line in process.stdout:
            output += line
            # The line of the validation before it reads "validate step: 0".
            if FIRST_STEP in line:
                seconds = tree_cpu_seconds(process.pid)
                process.kill()  # its workers die with it
                process.stdout.read()  # ends when the last of them has let go of the pipe
                process.wait()
                return seconds
        process.wait()
    sys.exit(f"the run ended before its first step:\n{output.decode(errors='replace')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    print(machine())
    seconds: dict[str, list[float]] = {"import torch": [], "first step": [], "first step, no validation": []}
    import_torch()  # what is not in the page cache yet
    for _ in range(arguments.rounds):
        seconds["import torch"].append(import_torch())
        seconds["first step"].append(first_step(overrides))
        seconds["first step, no validation"].append(first_step([*overrides, "--validation.enable=false"]))
    for name, values in seconds.items():
        print(f"{name:<26} {spread(values)} CPU s")
    for name in list(seconds)[1:]:
        beyond = [run - bare for run, bare in zip(seconds[name], seconds["import torch"], strict=True)]
        print(f"{name:<26} {spread(beyond)} CPU s beyond import torch (goal: 12)")


if __name__ == "__main__":
    main()
