"""`model.hf_assets_path`: the folder of a published model, which selects the tokenizer where [tokenizer] does not."""

from __future__ import annotations

import base64
from pathlib import Path as FilePath
from typing import Any, Final

from titan_lite.config.errors import FILE_MISSING, Problem

_FILES: Final = ("tokenizer.json", "original/tokenizer.model", "tokenizer.model")


def tokenizer_table(assets_path: str) -> tuple[dict[str, Any], Problem | None]:
    """The [tokenizer] table of a folder (or of one tokenizer file), and what is wrong with it.

    Where the folder is missing the table is still given, because estimating a model's cost needs no tokenizer files.
    """
    folder = FilePath(assets_path).expanduser()
    fallback = {"type": "huggingface", "path": assets_path}
    if folder.is_file():
        return {"type": _type_of(folder), "path": assets_path}, None
    if not folder.is_dir():
        return fallback, Problem(
            FILE_MISSING, "model.hf_assets_path", "there is no such folder", assets_path, _allowed()
        )
    for name in _FILES:
        if (folder / name).is_file():
            return {"type": _type_of(folder / name), "path": str(FilePath(assets_path) / name)}, None
    why = "the folder holds no tokenizer"
    return fallback, Problem(FILE_MISSING, "model.hf_assets_path", why, assets_path, _allowed())


def _allowed() -> str:
    return f"a folder with {', '.join(_FILES[:-1])} or {_FILES[-1]}, or the path of such a file"


def _type_of(file: FilePath) -> str:
    """A .json file is the tokenizers library's, a .model file tiktoken's (lines of base64, rank) or SentencePiece's."""
    if file.suffix == ".json":
        return "huggingface"
    with file.open("rb") as stream:
        first = stream.readline(4096).split()
    try:
        base64.b64decode(first[0], validate=True)
        int(first[1])
    except (IndexError, ValueError):
        return "sentencepiece"
    return "tiktoken" if len(first) == 2 else "sentencepiece"
