"""Validation batches: every held-out token once, the same number of batches on every rank."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.data.common import Settings, Validation, arrays, batches, data, raw_bytes, take, write_corpus, write_jsonl
from titan_lite.config.errors import ConfigError
from titan_lite.data.batch import IGNORE, Batch
from titan_lite.data.config import DataConfig
from titan_lite.data.documents import Split
from titan_lite.data.loader import validation_batches
from titan_lite.data.sources.files import Files


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    return write_corpus(tmp_path, [40, 30, 50]).model_copy(update={"held_out": 0.3})


def held_out(config: DataConfig) -> list[str]:
    return list(Split(config.source.build(), config.held_out, held_out=True).documents())


def run(config: DataConfig, n_ranks: int = 1, **keys: object) -> list[list[Batch]]:
    """Every rank's batches."""
    settings = Validation(**{"local_batch_size": 4 // n_ranks, **keys})  # type: ignore[arg-type]
    return [
        list(validation_batches(config, settings, raw_bytes(), dp_rank=rank, dp_size=n_ranks))
        for rank in range(n_ranks)
    ]


def test_every_token_is_a_target_once_and_in_order(corpus: DataConfig) -> None:
    (found,) = run(corpus)
    stream = [i for text in held_out(corpus) for i in (0xFE, *text.encode(), 0xFF)]
    targets = [i for batch in found for i in batch.targets.flatten().tolist()]
    n = len(stream) - 1
    assert targets[:n] == stream[1:]
    assert set(targets[n:]) <= {IGNORE}
    assert len(targets) - n < 4 * 16
    assert [i for batch in found for i in batch.tokens.flatten().tolist()][:n] == stream[:-1]


def test_documents_are_numbered_inside_a_row(corpus: DataConfig) -> None:
    (found,) = run(corpus)
    for batch in found:
        for tokens, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
            assert documents[0] == 0
            real = [i for i, token in enumerate(tokens) if token != 0xFF] or [0]
            starts = [int(tokens[i - 1] == 0xFF) for i in range(1, real[-1] + 1)]
            assert [b - a for a, b in pairwise(documents[: real[-1] + 1])] == starts


@pytest.mark.parametrize("steps", [-1, 3, 1000])
def test_ranks_share_the_global_batches(corpus: DataConfig, steps: int) -> None:
    (whole,) = run(corpus, steps=steps)
    for n_ranks in (2, 4):
        ranks = run(corpus, n_ranks, steps=steps)
        assert {len(found) for found in ranks} == {len(whole)}
        for step, batch in enumerate(whole):
            parts = [arrays(found[step]) for found in ranks]
            assert [sum((part[i] for part in parts), []) for i in range(3)] == arrays(batch)[:3]  # noqa: RUF017
    assert len(whole) == 3 if steps == 3 else len(whole) > 3


def test_repeats_exactly_also_with_a_worker(corpus: DataConfig) -> None:
    (first,), (again,), (worker,) = run(corpus), run(corpus), run(corpus, dataloader=Settings(num_workers=3))
    assert list(map(arrays, first)) == list(map(arrays, again)) == list(map(arrays, worker))


def test_training_never_sees_a_validation_document(corpus: DataConfig) -> None:
    trained = b"".join(
        bytes(row) for batch in take(batches(corpus, range(4), 4, seq_len=64), 150) for row in batch.tokens.tolist()
    )
    assert not [text for text in held_out(corpus) if text.encode() + b"\xff" in trained]


def test_a_source_of_its_own_is_read_whole(corpus: DataConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "a.jsonl", ["first", "second"])
    (found,) = run(corpus, own=Files.Config(path=str(other)))
    (batch,) = found
    targets = [i for i in batch.targets.flatten().tolist() if i != IGNORE]
    assert bytes(targets) == b"first\xff\xfesecond\xff"
    assert batch.targets[2:].eq(IGNORE).all()


def test_a_split_without_documents_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["only"])
    config = data(tmp_path, held_out=1e-9)
    with pytest.raises(ConfigError, match="no document held out for validation"):
        run(config)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"validation\.dataset"):
        run(config, own=Files.Config(path=str(tmp_path)))


def test_leaving_early_ends_the_worker(corpus: DataConfig) -> None:
    stream = validation_batches(corpus, Validation(dataloader=Settings(1)), raw_bytes(), dp_rank=0, dp_size=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(stream)
