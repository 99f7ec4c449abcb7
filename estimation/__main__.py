"""python -m estimation CONFIG: what a run will cost, before launch, on a machine without a GPU."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from titan_lite.config.errors import BAD_INPUT, ConfigError, main_guard

if TYPE_CHECKING:
    from estimation.compute import Assumptions

USAGE = """python -m estimation [-h] [--world-size N] [--device NAME] [--tokens N] [--assume NAME=VALUE ...] [--json]
                            CONFIG [--section.key=value ...]"""


@main_guard()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the estimate; returns 0. A config that training refuses ends with 2 and every problem."""
    parser = argparse.ArgumentParser(prog="python -m estimation", usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="the TOML file")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks; default: the product of the degrees")
    parser.add_argument("--device", default="h100-80gb", metavar="NAME", help="default: h100-80gb; cpu = this machine")
    parser.add_argument("--tokens", type=float, metavar="N", help="also say how long this many tokens take")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="change an assumption")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options, overrides = parser.parse_known_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        parser.error("--world-size must be at least 1")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        parser.error("--tokens must be positive")
    if options.config == "plan":
        parser.error("plan, the search for the best layout, is not available yet")
    from estimation.devices import device_of  # slow: torch
    from estimation.estimate import default_world_size, estimate
    from estimation.report import text
    from titan_lite.config.load import load_job

    device, assumed = device_of(options.device), _assumptions(options.assume)
    job = load_job(options.config, overrides, options.world_size, files=False)
    world_size = options.world_size or default_world_size(job)
    if options.world_size is None:
        job = load_job(options.config, overrides, world_size, files=False)
        print(f"world size {world_size}: the product of the degrees; --world-size sets another", file=sys.stderr)
    found = estimate(job, world_size, device, assumed)
    if not options.json:
        print(text(found, options.tokens))
        return 0
    out = found.as_dict()
    if options.tokens is not None:
        days = options.tokens / (found.tokens_per_second_per_device * world_size) / 86400
        out |= {"days": days, "device_hours": days * 24 * world_size}
    print(json.dumps(out, indent=2))
    return 0


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
