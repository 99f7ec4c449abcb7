"""Small corpora and short ways to the data side's parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_lite.data.config import DataConfig
from titan_lite.data.loader import Batch, TrainBatches, train_batches
from titan_lite.data.source import Source
from titan_lite.data.tokenizer import Bytes, Tokenizer


@dataclass(frozen=True)
class Settings:
    """[training.dataloader]."""

    num_workers: int = 0
    persistent_workers: bool = False
    pin_memory: bool = False
    prefetch_factor: int | None = None


@dataclass(frozen=True)
class Validation:
    """[validation]."""

    seq_len: int = 16
    local_batch_size: int = 2
    steps: int = -1
    dataloader: Settings = Settings()
    own: Source.Config | None = None

    def source(self) -> Source.Config | None:
        return self.own


def tokenizer(**table: Any) -> Tokenizer:
    return Tokenizer.Config.choose(table).build()


def raw_bytes() -> Bytes:
    return Bytes.Config().build()


def source(**table: Any) -> Source:
    return Source.Config.choose(table).build()


def everything(row: int) -> bool:
    return True


def write_jsonl(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_corpus(folder: Path, sizes: list[int]) -> DataConfig:
    """One jsonl file per size, of that many documents of 5 to 65 characters."""
    for shard, size in enumerate(sizes):
        texts: list[str | None] = [f"<{shard}.{row}>" + "x" * (37 * (row + 5 * shard) % 59) for row in range(size)]
        write_jsonl(folder / f"{shard:02d}.jsonl", texts)
    return data(folder)


def data(path: Path, **keys: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {"type": "files", "path": str(path)}, **keys})


def batches(config: DataConfig, rows: range, lanes: int, **keys: Any) -> TrainBatches:
    defaults: dict[str, Any] = {"seq_len": 16, "seed": 0, "settings": Settings()}
    return train_batches(config, raw_bytes(), rows=rows, lanes=lanes, **(defaults | keys))


def take(loader: TrainBatches, n: int) -> list[Batch]:
    try:
        return [next(loader) for _ in range(n)]
    finally:
        loader.close()


def arrays(batch: Batch) -> list[Any]:
    """A batch as plain values, to compare."""
    return [batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist(), batch.cursors]
