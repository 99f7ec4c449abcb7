"""`python -m titan_lite.config --schema`, `--explain [KEY]` and `--features [FILE]`."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

from titan_lite.config.errors import main_guard
from titan_lite.config.explain import explain, json_schema
from titan_lite.config.features import feature_table, write_features


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
    what.add_argument(
        "--features", metavar="FILE", nargs="?", const="", help="table of all model features, or write it into a file"
    )
    arguments = parser.parse_args()
    from titan_lite.job import Job
    from titan_lite.models.transformer import Transformer

    if arguments.features is not None:
        table = feature_table(Transformer.Config, ("model",))
        if arguments.features:
            write_features(Path(arguments.features), table)
        else:
            print(table)
        return
    print(json.dumps(json_schema(Job), indent=2) if arguments.schema else explain(arguments.explain, Job))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    main()
