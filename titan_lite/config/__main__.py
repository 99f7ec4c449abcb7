"""`python -m titan_lite.config --schema` and `--explain [KEY]`."""

from __future__ import annotations

import argparse
import json
import signal

from titan_lite.config.errors import main_guard
from titan_lite.config.explain import explain, json_schema


@main_guard()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m titan_lite.config", description="Documentation of the TOML file.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--schema", action="store_true", help="JSON Schema, with which editors complete and document keys"
    )
    what.add_argument(
        "--explain", metavar="KEY", nargs="?", const="", help="keys, types, defaults: all sections, or one"
    )
    arguments = parser.parse_args()
    from titan_lite.job import Job

    print(json.dumps(json_schema(Job), indent=2) if arguments.schema else explain(arguments.explain, Job))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    main()
