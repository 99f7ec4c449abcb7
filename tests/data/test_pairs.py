"""Pairs of texts: rows as written out by hand, the same for every way of sharing them out and resuming."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.common import Settings, Validation, arrays, batches, raw_bytes, source, take
from titan_lite.config.errors import ConfigError
from titan_lite.data.config import DataConfig
from titan_lite.data.loader import train_batches, validation_batches

T = 16
BOS, EOS, IGNORE = 0xFE, 0xFF, -100


def write(folder: Path, shards: list[list[dict[str, Any]]]) -> DataConfig:
    for number, records in enumerate(shards):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{number}.jsonl").write_text(lines)
    return config(folder)


def config(path: Path, **keys: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {"type": "pairs", "path": str(path)}, "held_out": 0.0, **keys})


def record(number: int) -> dict[str, Any]:
    return {"prompt": f"p{number}:", "chosen": "g" * (1 + number % 5), "rejected": "b" * (1 + number % 7)}


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    return write(tmp_path, [[record(n) for n in range(9)], [record(n) for n in range(20, 26)]])


def row(prompt: str, answer: str, is_better: bool) -> tuple[list[int], list[int], list[int]]:
    """Tokens, targets and documents of one text."""
    before, after = [BOS, *prompt.encode()], [*answer.encode(), EOS]
    ids = before + after
    padded = ids + [EOS] * (T - len(ids))
    targets = [IGNORE] * (len(before) - 1) + (after if is_better else [IGNORE] * len(after))
    return padded, targets + [IGNORE] * (T - len(targets)), [0] * len(ids) + [1] * (T - len(ids))


def expected(records: list[dict[str, Any]]) -> list[tuple[list[int], list[int], list[int]]]:
    return [row(r["prompt"], r[key], key == "chosen") for r in records for key in ("chosen", "rejected")]


def test_rows_as_written_out_by_hand(tmp_path: Path) -> None:
    """One shard, two pairs a step, in the order of the file."""
    data = write(tmp_path, [[record(n) for n in range(6)]]).model_copy(update={"shuffle": False})
    for index, batch in enumerate(take(batches(data, range(4), 4), 3)):
        wanted = expected([record(2 * index), record(2 * index + 1)])
        for got, part in zip((batch.tokens, batch.targets, batch.documents), zip(*wanted, strict=True), strict=True):
            assert got.tolist() == list(part)


def test_two_whole_texts_without_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"chosen": "abc", "rejected": "de"}\n')
    table = {"type": "pairs", "path": str(tmp_path), "prompt_key": ""}
    (batch,) = take(batches(config(tmp_path, source=table), range(2), 2), 1)
    assert batch.tokens.tolist() == [row("", "abc", True)[0], row("", "de", False)[0]]
    assert batch.targets[0].tolist() == row("", "abc", True)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_read_what_one_process_reads(corpus: DataConfig, workers: int) -> None:
    whole = take(batches(corpus, range(8), 8), 6)
    settings = Settings(num_workers=workers, persistent_workers=workers > 0)
    shares = [take(batches(corpus, rows, 8, settings=settings), 6) for rows in (range(4), range(4, 8))]
    for batch, *parts in zip(whole, *shares, strict=True):
        first, second = map(arrays, parts)
        assert arrays(batch) == [one + other for one, other in zip(first, second, strict=True)]


def test_it_goes_on_where_it_was(corpus: DataConfig) -> None:
    loader = batches(corpus, range(8), 8)
    before = list(islice(loader, 3))
    after = take(loader, 4)
    again = take(batches(corpus, range(8), 8, cursors=before[-1].cursors), 4)
    assert list(map(arrays, after)) == list(map(arrays, again))


def test_pairs_that_do_not_fit_or_say_nothing_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "p", "chosen": "x" * T, "rejected": "y"}
    empty = {"prompt": "p", "chosen": "", "rejected": "y"}
    data = write(tmp_path, [[record(0), long, empty, record(1)]]).model_copy(update={"shuffle": False})
    with caplog.at_level(logging.WARNING):
        first, second = take(batches(data, range(2), 2), 2)
    assert first.tokens.tolist() == [r[0] for r in expected([record(0)])]
    assert second.tokens.tolist() == [r[0] for r in expected([record(1)])]
    assert second.dropped == 2
    assert "1 documents were left out so far" in caplog.text or "2 documents were left out so far" in caplog.text


def test_where_no_pair_fits_nothing_begins(tmp_path: Path) -> None:
    data = write(tmp_path, [[{"prompt": "p", "chosen": "x" * T, "rejected": "y"}]])
    with pytest.raises(ConfigError, match="no pair fits into rows of 16 tokens"):
        batches(data, range(2), 2)


def test_half_a_pair_is_no_share(corpus: DataConfig) -> None:
    with pytest.raises(ConfigError, match="its rows come in pairs, and a rank's share of them is 3"):
        train_batches(corpus, raw_bytes(), seq_len=T, lanes=6, rows=range(3), seed=0, settings=Settings())


def test_validation_reads_each_held_out_pair_once(tmp_path: Path) -> None:
    """3 pairs in batches of 2 on each of two ranks: the last ones are filled up, without document 0."""
    records = [record(n) for n in range(3)]
    data = write(tmp_path, [records])
    own = Validation(seq_len=T, own=data.source)
    seen: list[tuple[Any, ...]] = []
    per_rank = [list(validation_batches(data, own, raw_bytes(), dp_rank=rank, dp_size=2)) for rank in range(2)]
    for together in zip(*per_rank, strict=True):
        for batch in together:
            parts = (batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist())
            seen += [r for r in zip(*parts, strict=True) if r[2][0] == 0]
    assert seen == expected(records)
    last = per_rank[1][-1]
    assert (last.targets == IGNORE).all()
    assert (last.documents == 1).all()


def test_parquet_and_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    columns = {key: [record(n)[key] for n in range(3)] for key in ("prompt", "chosen", "rejected")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    found = list(source(type="pairs", path=str(tmp_path)).read("a.parquet", 0, lambda _: True))
    assert [json.loads(text) for _, text in found] == [list(record(n).values()) for n in range(3)]
    named = source(type="pairs", path=str(tmp_path), chosen_key="best")
    with pytest.raises(ConfigError, match=r"a.parquet: there is no column 'best' \(chosen_key\) among 'prompt'"):
        list(named.read("a.parquet", 0, lambda _: True))
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": 3}\n')
    lines = source(type="pairs", path=str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match=r"b.jsonl, line 2: 'chosen' should be a string, got a number"):
        list(lines.read("b.jsonl", 0, lambda _: True))
