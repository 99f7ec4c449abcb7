"""python -m estimation CONFIG: what a run will cost, before launch, on a machine without a GPU.

python -m estimation plan CONFIG --gpus N: which layout of N devices trains it fastest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titan_lite.config.errors import BAD_INPUT, NOT_HERE, ConfigError, main_guard

if TYPE_CHECKING:
    from estimation.compute import Assumptions

USAGE = """python -m estimation [-h] [--world-size N] [--device NAME] [--tokens N] [--plot FILE.png] [--json]
                            [--assume NAME=VALUE ...] [--no-advice] [--jobs N] CONFIG [--section.key=value ...]
       python -m estimation plan --help"""
PLAN_USAGE = """python -m estimation plan [-h] --gpus N [--device NAME] [--plot FILE.png] [--write FILE.toml] [--json]
                                 [--assume NAME=VALUE ...] [--layouts N] [--jobs N] CONFIG [--section.key=value ...]"""
PLAN_DESCRIPTION = """The legal layouts of N devices (replicas, shards, tensor, context, pipeline and expert parallel),
with what backward recomputes and the size of a micro-batch, by predicted time per token. Keys given on the command line
stay as they are: they are not searched over."""
CONFIG_HELP = "the TOML file; any of its keys can be set behind it"
DEVICE_HELP = "default: h100-80gb; cpu = this machine; an unknown name lists all"
LAYOUTS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the two commands; returns 0. A config that training refuses ends with 2 and every problem."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with main_guard():
            code = _plan(arguments[1:]) if arguments[:1] == ["plan"] else _estimate(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as `head` does; what is left in the buffer would raise once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _estimate(arguments: Sequence[str]) -> int:
    description = "Memory, time and communication of a rank: by the training code itself, on tensors without content."
    parser = argparse.ArgumentParser("python -m estimation", USAGE, description, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks; default: the product of the degrees")
    parser.add_argument("--tokens", type=float, metavar="N", help="also say how long this many tokens take")
    parser.add_argument("--no-advice", action="store_true", help="do not look for changes that make it fit")
    _add_common(parser, "memory over the step, stacked by category")
    options, overrides = parser.parse_known_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        parser.error("--world-size must be at least 1")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        parser.error("--tokens must be positive")
    _check_common(parser, options)
    from estimation.advice import advice  # slow: torch
    from estimation.devices import device_of
    from estimation.estimate import default_world_size, estimate
    from estimation.plot import draw_step
    from estimation.question import Question
    from estimation.report import text
    from titan_lite.config.load import load_job

    device, assumed = device_of(options.device), _assumptions(options.assume)
    job = load_job(options.config, overrides, options.world_size, files=False)
    world_size = options.world_size or default_world_size(job)
    if options.world_size is None:
        job = load_job(options.config, overrides, world_size, files=False)
        print(f"world size {world_size}: the product of the degrees; --world-size sets another", file=sys.stderr)
    found = estimate(job, world_size, device, assumed)
    if options.plot:
        draw_step(found, options.plot)
    changes = None
    if not found.fits and not options.no_advice:
        question = Question(options.config, tuple(overrides), world_size, device, assumed)
        changes = advice(question, options.jobs, _tell)
    if not options.json:
        print(text(found, options.tokens, changes))
        return 0
    out = found.as_dict()
    if options.tokens is not None:
        days = options.tokens / (found.tokens_per_second_per_device * world_size) / 86400
        out |= {"days": days, "device_hours": days * 24 * world_size}
    if changes is not None:
        out["advice"] = [outcome.as_dict() for outcome in changes]
    print(json.dumps(out, indent=2))
    return 0


def _plan(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m estimation plan", PLAN_USAGE, PLAN_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("--gpus", type=int, metavar="N", required=True, help="devices, over all nodes")
    parser.add_argument("--write", type=Path, metavar="FILE.toml", help="write the best as a config, on top of CONFIG")
    limit = f"estimate at most so many layouts; default: {LAYOUTS}"
    parser.add_argument("--layouts", type=int, metavar="N", default=LAYOUTS, help=limit)
    _add_common(parser, "memory against time of the candidates")
    options, overrides = parser.parse_known_args(arguments)
    for name in ("gpus", "layouts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    _check_common(parser, options)
    if options.write:
        _check_new_file("--write", options.write, ".toml")
    from estimation import plan_report  # slow: torch
    from estimation.devices import device_of
    from estimation.plan import plan
    from estimation.plot import draw_plan
    from estimation.question import Question, keys_of

    device, assumed = device_of(options.device), _assumptions(options.assume)
    question = Question(options.config, tuple(overrides), options.gpus, device, assumed)
    found = plan(question, keys_of(overrides), options.layouts, options.jobs, _tell)
    if options.plot:
        draw_plan(found, options.plot)
    if not found.ranked:
        raise plan_report.nothing_fits(found)
    if options.write:
        plan_report.write_config(found, options.write)
    print(json.dumps(plan_report.as_dict(found), indent=2) if options.json else plan_report.text(found))
    return 0


def _add_common(parser: argparse.ArgumentParser, picture: str) -> None:
    parser.add_argument("--device", default="h100-80gb", metavar="NAME", help=DEVICE_HELP)
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="change one of those listed"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"draw {picture} (extra `plot`)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that estimate; default: the CPUs, at most 8")


def _check_common(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Before anything slow: what is written must be writable, and what draws it be there."""
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.plot:
        _check_new_file("--plot", options.plot, ".png")
        from titan_lite.config.machine import is_installed

        if not is_installed("matplotlib"):
            why = "is drawn by matplotlib, which is not installed: pip install 'titan_lite[plot]'"
            raise ConfigError.at("--plot", why, str(options.plot), "no picture without the extra `plot`", code=NOT_HERE)


def _check_new_file(option: str, path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise ConfigError.at(option, "has another ending", str(path), f"FILE{suffix}", code=BAD_INPUT)
    if path.exists():
        raise ConfigError.at(option, "exists already and is not overwritten", str(path), "a new file", code=BAD_INPUT)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = f"cannot be written: {path.parent} is not a folder that one may write to"
        raise ConfigError.at(option, why, str(path), code=BAD_INPUT)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _assumptions(given: Sequence[str]) -> Assumptions:
    from estimation.compute import Assumptions

    defaults = Assumptions().model_dump()
    values: dict[str, float] = {}
    for entry in given:
        name, _, value = entry.partition("=")
        if name not in defaults:
            raise ConfigError.at("--assume", f"nothing is called {name!r}", entry, ", ".join(defaults), code=BAD_INPUT)
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        share = name.endswith(("efficiency", "overlap"))
        low = 0.01 if name.endswith("efficiency") else 0.0
        if not low <= values[name] <= (1.0 if share else 1e6):
            allowed = f"a number from {low} to 1" if share else "a number from 0"
            raise ConfigError.at("--assume", "is out of range", entry, allowed, code=BAD_INPUT)
    return Assumptions(**values)


if __name__ == "__main__":
    sys.exit(main())
