#!/usr/bin/env python
"""Makes a checkpoint of a Hugging Face folder: scripts/convert_from_hf.py HF_DIR OUT_DIR

OUT_DIR gets checkpoint/step-0, the tokenizer and a config.toml: `./run_train.sh OUT_DIR/config.toml` goes on training.
HF_DIR holds config.json, safetensors and a tokenizer; with --torchtitan it is a DCP folder (step-N). Exit codes: 0
done, 2 bad input, 1 everything else: no OUT_DIR then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from titan_lite.config.errors import main_guard


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="folder to read")
    parser.add_argument(
        "--torchtitan",
        type=Path,
        metavar="CONFIG",
        help="HF_DIR is a checkpoint of torchtitan's Llama 3 with this config",
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to make; nothing is overwritten")
    return parser.parse_args(given)


@main_guard()
def main(given: list[str] | None = None) -> int:
    """Converts; returns the exit code."""
    options = arguments(given)
    from titan_lite.hf.errors import ConversionError
    from titan_lite.hf.importer import import_folder
    from titan_lite.hf.torchtitan import import_torchtitan

    try:
        if options.torchtitan is None:
            import_folder(options.source, options.out)
        else:
            import_torchtitan(options.source, options.torchtitan, options.out)
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: continue with ./run_train.sh {options.out / 'config.toml'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
