"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from titan_lite.checkpoint.manifest import Manifest

METRICS: Final = "metrics.jsonl"


def losses(step_folder: Path, step: int) -> dict[str, float]:
    """The last losses up to a step in the metrics of the run that a step folder belongs to, as far as there are any."""
    found: dict[str, float] = {}
    for row in _rows(step_folder.parent.parent / METRICS):
        for key in ("loss", "validation_loss", "validation_bits_per_byte"):
            if row.get("step", step + 1) <= step and isinstance(row.get(key), (int, float)):
                found[key] = row[key]
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a crash has cut
        if isinstance(row, dict):
            yield row


def model_card(
    name: str, manifest: Manifest, train_state: dict[str, Any], found: dict[str, float], architecture: str, loads: str
) -> str:
    """README.md: what the model is and how it was trained. `loads` is the Python code that loads it."""
    facts = {
        "architecture": architecture,
        "parameters": f"{manifest.model.parameters:,}",
        "optimizer steps": f"{manifest.step:,}",
        "tokens trained on": f"{train_state['tokens_seen']:,}" if "tokens_seen" in train_state else "not recorded",
        "training loss": found.get("loss", "not recorded"),
        "validation loss": found.get("validation_loss", "not recorded"),
        "validation bits per byte": found.get("validation_bits_per_byte", "not recorded"),
        "data fingerprint": f"`{manifest.data}`" if manifest.data else "not recorded",
        "tokenizer fingerprint": f"`{manifest.tokenizer}`" if manifest.tokenizer else "not recorded",
        "run": f"`{manifest.run_id}`, saved {manifest.created}",
        "software": ", ".join(f"{package} {version}" for package, version in manifest.versions.items()),
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- titan_lite
---

# {name}

A language model trained with titan_lite.

| | |
|---|---|
{table}
```python
{loads}
```

`conversion_report.json` says how this folder was made from the checkpoint and what was compared.

## Training config

```toml
{manifest.config.strip()}
```
"""
