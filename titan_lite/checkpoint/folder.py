"""Step folders: how they are named, listed, found, retired and removed.

checkpoint/step-40/               complete (a folder of this name is only ever made by a rename)
checkpoint/step-50.tmp-<id>/      a save that is running, or died
checkpoint/step-30.deleted-<id>/  being removed
checkpoint/step-50.retired-<id>/  left behind by `load_step`; never removed and never loaded by itself
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from titan_lite.config.errors import BAD_INPUT, FILE_MISSING, ConfigError, Problem

STEP = re.compile(r"step-(0|[1-9]\d*)")
JUNK = re.compile(r"step-\d+\.(tmp|deleted)-[0-9a-f]+")
MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    return f"step-{step}"


def fresh_name(step: int, kind: str) -> str:
    """`step-N.<kind>-<id>`: a name that nothing else has."""
    return f"{step_name(step)}.{kind}-{uuid.uuid4().hex[:12]}"


def list_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending. Order is by step: clocks and file times play no part."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for name in names if (match := STEP.fullmatch(name)))


def find_checkpoint(path: str | Path, otherwise: str = "") -> Path:
    """The step folder meant by `path`: a step folder, a checkpoint folder or a dump folder (their newest step).

    ConfigError where there is none; `otherwise` is what else the caller would have taken.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() or STEP.fullmatch(path.name):
        if not path.is_dir():
            raise ConfigError.at(str(path), "this checkpoint folder does not exist", code=FILE_MISSING)
        return path
    if steps := list_steps(path):
        return path / step_name(steps[-1])
    children = [child for child in path.iterdir() if list_steps(child)] if path.is_dir() else []
    if len(children) > 1:
        children = [child for child in children if child.name == "checkpoint"] or children
    if len(children) == 1:
        return children[0] / step_name(list_steps(children[0])[-1])
    why = "the folder does not exist" if not path.exists() else "there is no checkpoint in it"
    if children:
        why = f"more than one folder in it has checkpoints: {', '.join(sorted(child.name for child in children))}"
    allowed = f"a step-N folder, a checkpoint folder or a run's dump folder{otherwise}"
    raise ConfigError.at(str(path), why, allowed=allowed, code=FILE_MISSING)


def damaged(path: Path, why: str) -> Problem:
    """A problem with a file of a step folder; names the older checkpoints that can be loaded instead."""
    if match := STEP.fullmatch(path.parent.name):
        older = [step for step in list_steps(path.parent.parent) if step < int(match[1])]
        if older:
            listed = ", ".join(map(str, older[-5:]))
            why += f"; an older one can be loaded with --checkpoint.load_step={older[-1]} (steps there: {listed})"
    return Problem(BAD_INPUT, str(path), why)


def refuse(path: Path, why: str) -> ConfigError:
    return ConfigError([damaged(path, why)])


def retire_after(folder: Path, step: int) -> list[str]:
    """Renames every step folder later than `step` out of the way; returns the new names."""
    retired = []
    for later in list_steps(folder):
        if later > step:
            name = fresh_name(later, "retired")
            os.rename(folder / step_name(later), folder / name)
            retired.append(name)
    sync_folder(folder)
    return retired


def remove_step(folder: Path, step: int) -> None:
    """Deletes a step folder; renamed first, so that a half-deleted one is never listed."""
    doomed = folder / fresh_name(step, "deleted")
    os.rename(folder / step_name(step), doomed)
    sync_folder(folder)
    shutil.rmtree(doomed)


def collect_junk(folder: Path) -> list[str]:
    """Removes what saves and deletions that died have left; returns the names. Only with the run's lock in hand."""
    names = sorted(entry.name for entry in folder.iterdir() if JUNK.fullmatch(entry.name)) if folder.is_dir() else []
    for name in names:
        shutil.rmtree(folder / name)
    return names


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (creations, renames) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def mount_point(path: Path) -> Path:
    path = path.absolute()
    while not path.is_mount():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path`."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def show_bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
