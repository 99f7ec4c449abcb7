"""run_train.sh's environment: which Python it uses, when it installs, and what it makes of an interrupted set-up.

The checkout under test is a copy with a stand-in for the package, and pip is a stand-in that notes how it was called.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import ROOT

FAKE_LAUNCH = "import os, sys; print(os.getpid(), *sys.argv[1:]); sys.exit(75)"
FAKE_PIP = """
import os, pathlib, sys
with open(os.environ["PIP_CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
sys.exit(int(os.environ.get("PIP_CODE", "0")))
"""
# `python3.11 -m venv` without the seconds that ensurepip takes, and with the stand-in for pip.
FAKE_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    "{python}" -m venv --without-pip "$3"
    mkdir "$3/lib/python{version}/site-packages/pip"
    cp "{pip}" "$3/lib/python{version}/site-packages/pip/__main__.py"
else
    exec "{python}" "$@"
fi
"""
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class Machine:
    """A fresh machine: a checkout, a python3.11 without this project, and a folder for environments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.calls = folder, folder / "checkout", folder / "pip_calls"
        (self.checkout / "scripts").mkdir(parents=True)
        for name in ("run_train.sh", "scripts/_environment.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout / name)
        (self.checkout / "titan_lite").mkdir()
        (self.checkout / "titan_lite/__init__.py").touch()
        (self.checkout / "titan_lite/launch.py").write_text(FAKE_LAUNCH)
        (folder / "bin").mkdir()
        (folder / "fake_pip.py").write_text(FAKE_PIP)
        python = folder / "bin/python3.11"
        base = Path(sys.base_prefix) / "bin" / f"python{VERSION}"
        python.write_text(FAKE_PYTHON.format(python=base, version=VERSION, pip=folder / "fake_pip.py"))
        python.chmod(0o755)

    def environment(self, name: str, checkout: Path | None, editable: bool = True) -> Path:
        """A virtual environment in which `checkout` is installed, as pip's metadata tell; returns its bin folder."""
        venv = self.folder / name
        subprocess.run([self.folder / "bin/python3.11", "-m", "venv", venv], check=True)
        named = venv / "bin" / f"python{VERSION}"
        for link in (venv / "bin/python", venv / "bin/python3"):
            link.unlink()
            link.symlink_to(named.readlink())
        named.unlink()  # else it, instead of the stand-in, would make .venv
        if checkout is not None:
            site = venv / f"lib/python{VERSION}/site-packages"
            info = site / "titan_lite-0.1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: titan_lite\nVersion: 0.1.0\n")
            origin = {"url": checkout.as_uri(), "dir_info": {"editable": editable}}
            (info / "direct_url.json").write_text(json.dumps(origin))
            (site / "titan_lite.pth").write_text(str(checkout))
        return venv / "bin"

    def command(self, *command: str, active: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """Starts a command with `active` as the active environment."""
        path = [str(active)] if active else []
        env = {"PATH": os.pathsep.join([*path, str(self.folder / "bin"), "/usr/bin", "/bin"]), "HOME": str(self.folder)}
        env |= {"PIP_CALLS": str(self.calls), **variables}
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def choose(self, extras: str = "hf", active: Path | None = None, **variables: str) -> tuple[int, str, str]:
        """Exit code, chosen Python and stderr of `use_environment`."""
        script = (
            f'set -euo pipefail; source checkout/scripts/_environment.sh; use_environment "{extras}"; echo "$PYTHON"'
        )
        process = self.command("bash", "-c", script, active=active, **variables)
        out, error = process.communicate(timeout=60)
        return process.returncode, out.strip(), error

    def pip_calls(self) -> list[str]:
        """The argument lists pip has been called with."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_an_active_environment_with_this_checkout_is_used_as_it_is(machine: Machine) -> None:
    active = machine.environment("active", machine.checkout)
    assert machine.choose(active=active) == (0, str(active / "python"), "")
    assert not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize("installed", ["another", "none", "not editable"])
def test_any_other_active_environment_is_left_alone(machine: Machine, installed: str) -> None:
    checkout = {"another": machine.folder / "elsewhere", "none": None, "not editable": machine.checkout}[installed]
    active = machine.environment("active", checkout, editable=installed != "not editable")
    # Found on PYTHONPATH is not installed, not even with metadata.
    elsewhere = machine.environment("third", machine.checkout).parent / f"lib/python{VERSION}/site-packages"
    code, python, _ = machine.choose(active=active, PYTHONPATH=f"{elsewhere}:{machine.checkout}")
    assert (code, python) == (0, str(machine.checkout / ".venv/bin/python"))


def test_a_fresh_machine_installs_once(machine: Machine) -> None:
    code, python, error = machine.choose()
    assert (code, python) == (0, str(machine.checkout / ".venv/bin/python"))
    assert "installing titan_lite[hf]" in error
    root = machine.checkout
    assert machine.pip_calls() == [f"install --disable-pip-version-check -e {root}[hf] -c {root}/constraints.txt"]
    assert machine.choose() == (0, python, "")
    assert len(machine.pip_calls()) == 1


def test_new_extras_and_changed_pins_are_added_to_what_is_there(machine: Machine) -> None:
    machine.choose("hf")
    machine.choose("hf dev")
    assert "[dev,hf]" in machine.pip_calls()[1]
    assert machine.choose("hf")[0] == 0
    assert len(machine.pip_calls()) == 2
    with (machine.checkout / "constraints.txt").open("a") as file:
        file.write("something==1\n")
    machine.choose("hf")
    assert "[dev,hf]" in machine.pip_calls()[2]


def test_an_interrupted_installation_is_started_afresh(machine: Machine) -> None:
    code, _, _ = machine.choose(PIP_CODE="1")
    assert code == 1
    (machine.checkout / ".venv/half").touch()
    code, _, error = machine.choose()
    assert code == 0
    assert "interrupted" in error
    assert not (machine.checkout / ".venv/half").exists()


def test_a_venv_of_the_users_is_not_touched(machine: Machine) -> None:
    machine.environment("checkout/.venv", None)
    (machine.checkout / ".venv/precious").touch()
    code, _, error = machine.choose()
    assert code == 1
    assert "pip install -e" in error
    assert (machine.checkout / ".venv/precious").exists()
    assert machine.pip_calls() == []
    shutil.rmtree(machine.checkout / ".venv")
    own = machine.environment("checkout/.venv", machine.checkout)
    assert machine.choose() == (0, str(own / "python"), "")


def test_two_first_starts_at_once_install_once(machine: Machine) -> None:
    script = "set -e; source checkout/scripts/_environment.sh; use_environment hf"
    processes = [machine.command("bash", "-c", script) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(machine.pip_calls()) == 1


def test_run_train_becomes_the_launcher(machine: Machine) -> None:
    active = machine.environment("active", machine.checkout)
    script = str(machine.checkout / "run_train.sh")
    default = f"{machine.checkout}/train_configs/debug.toml"
    calls = [
        (["my.toml", "--training.steps=1"], {"CONFIG_FILE": "other.toml"}, "my.toml --training.steps=1"),
        (["--training.steps=1"], {"CONFIG_FILE": "other.toml"}, "other.toml --training.steps=1"),
        (["--training.steps", "1"], {}, f"{default} --training.steps 1"),
        ([], {}, default),
    ]
    for arguments, variables, expected in calls:
        process = machine.command(script, *arguments, active=active, **variables)
        out, error = process.communicate(timeout=60)
        assert out.strip() == f"{process.pid} {expected}", error  # the same process: signals and exit codes pass
        assert process.returncode == 75
