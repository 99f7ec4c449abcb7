"""Prompts from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_lite.config.errors import FILE_MISSING, ConfigError


def read_prompts(path: Path) -> list[str]:
    """A prompt per line; of a .jsonl file each line is a JSON string, or an object with the prompt in "prompt".

    ConfigError with the line where something else stands there, and for a file without a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at what texts may hold
    except OSError as error:
        raise ConfigError.at(str(path), f"cannot be read: {error.strerror}", code=FILE_MISSING) from None
    except UnicodeDecodeError as error:
        raise ConfigError.at(str(path), f"is not UTF-8: {error}") from None
    prompts = list(_from_json(path, lines)) if path.suffix == ".jsonl" else [line for line in lines if line]
    if not prompts:
        raise ConfigError.at(str(path), "has no prompts", allowed="one per line")
    return prompts


def _from_json(path: Path, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)
        except ValueError as error:
            raise ConfigError.at(f"{path}:{number}", f"is not valid JSON: {error}") from None
        prompt = found.get("prompt") if isinstance(found, dict) else found
        if not isinstance(prompt, str):
            raise ConfigError.at(f"{path}:{number}", "has no prompt", allowed='a string, or {"prompt": "..."}')
        yield prompt
