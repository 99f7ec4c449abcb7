"""The command `scripts/check_config.py`: every problem of a config, without starting anything."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from titan_lite.config.errors import EXIT_BAD_INPUT, ConfigError

USAGE = "check_config.py [-h] [--world-size N] [--json] CONFIG [--section.key=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints all problems and warnings of a config. Returns the exit code: 0 or 2."""
    parser = argparse.ArgumentParser(prog="check_config.py", usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="the TOML file")
    parser.add_argument("--world-size", type=int, metavar="N", help="also check what depends on the number of ranks")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options, overrides = parser.parse_known_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        parser.error("--world-size must be at least 1")
    from titan_lite.config.load import load_job  # slow: knows every component

    problems: ConfigError | None = None
    warnings: tuple[str, ...] = ()
    try:
        warnings = load_job(options.config, overrides, options.world_size).warnings
    except ConfigError as error:
        problems, warnings = error, error.warnings
    if options.json:
        found = [problem.as_dict() for problem in problems.problems] if problems else []
        print(json.dumps({"ok": not problems, "problems": found, "warnings": list(warnings)}, indent=2))
    else:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(problems if problems else f"{options.config}: ok", file=sys.stderr if problems else sys.stdout)
    return EXIT_BAD_INPUT if problems else 0
