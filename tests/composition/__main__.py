"""Tries every job of the arrays and writes what came of them: python -m tests.composition [--results FILE]

Writes docs/composition.md; the exit code is 1 where a job was not equal to one process. With a file for results, a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks share the cores

from benchmarks.measure import machine
from tests.combinations.factors import Row
from tests.composition.campaign import run
from tests.composition.case import Outcome
from tests.composition.table import document

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """What was found, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {key: Outcome(*outcome) for key, outcome in map(json.loads, lines)}
        self.began = time.monotonic()

    def known(self, array: str, row: Row) -> Outcome | None:
        return self.found.get(self._key(array, row))

    def tell(self, array: str, row: Row, outcome: Outcome) -> None:
        key = self._key(array, row)
        self.found[key] = outcome
        with self.path.open("a") as file:
            file.write(json.dumps([key, outcome]) + "\n")
        said = "\n    ".join(outcome.failures[:5]) or "equal"
        print(f"{time.monotonic() - self.began:.0f} s: {array}, {row['parallelism']}: {said}", flush=True)
        if outcome.failures:
            print(f"  {key}", flush=True)

    @staticmethod
    def _key(array: str, row: Row) -> str:
        return f"{array}: {', '.join(f'{key}={name}' for key, name in row.items() if name != 'absent')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="file of results, to go on from and to add to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="composition-") as name:
        folder = Path(name)
        results = Results(options.results or folder / "results.jsonl")
        campaigns = list(run(folder, results.known, results.tell))
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    (ROOT / "docs" / "composition.md").write_text(document(campaigns, when, machine()))
    return 1 if any(outcome.failures for campaign in campaigns for _, outcome in campaign.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
