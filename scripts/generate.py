#!/usr/bin/env python
"""Continues texts with a trained model: scripts/generate.py CHECKPOINT_OR_HF_DIR --prompt TEXT [options]

One prompt is continued in the terminal as it comes; several (--prompt again, --prompts FILE, --samples) side by side,
each exactly as it would be alone. A model that is too large for one device is split over the processes of a torchrun:

    torchrun --nproc-per-node 2 scripts/generate.py CHECKPOINT --prompt TEXT --tensor-parallel 2

Exit codes: 0 done, 2 bad input, 1 everything else.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from titan_lite.config.errors import main_guard


@main_guard()
def main(given: list[str] | None = None) -> int:
    """Generates; returns the exit code."""
    from titan_lite.generation.options import parse

    options = parse(given, __doc__)
    from titan_lite.generation.command import run

    try:
        run(options)
    except FloatingPointError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()  # behind what has been said so far
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
