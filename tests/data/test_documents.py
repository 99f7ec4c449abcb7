"""The order of documents and the split into training and held-out ones."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import xxhash

from tests.data.common import data, source, write_corpus, write_jsonl
from titan_lite.config.errors import ConfigError
from titan_lite.data import documents
from titan_lite.data.documents import START, Group, Split, permutation


def groups(split: Split, n_groups: int, shuffle: bool = True, seed: int = 0) -> list[Group]:
    shards = tuple(split.source.shards())
    return [Group(split, shards, k, n_groups, seed, shuffle) for k in range(n_groups)]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return Split(write_corpus(tmp_path, [7, 1, 12, 5, 9]).source.build(), 0.0, held_out=False)


def test_permutation_is_one_and_never_changes() -> None:
    assert sorted(permutation(1000, "x")) == list(range(1000))
    assert permutation(1000, "x").tolist() != permutation(1000, "y").tolist()
    assert permutation(0, "x").tolist() == []
    for n, key in ((10, "pinned"), (300, "")):
        start = xxhash.xxh3_64_intdigest(key.encode())
        assert permutation(n, key).tolist() == sorted(range(n), key=lambda i: splitmix64(start, i + 1))


def splitmix64(start: int, step: int) -> int:
    """The step-th number of the generator, after the C code by S. Vigna."""
    z = (start + step * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_permutation_is_fair() -> None:
    first = Counter(int(permutation(5, f"{i}")[0]) for i in range(2000))
    assert all(300 < first[i] < 500 for i in range(5))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_groups", [1, 2, 3, 5])
def test_an_epoch_has_every_shard_once_and_a_cycle_gives_every_shard_to_every_group(
    split: Split, n_groups: int, shuffle: bool
) -> None:
    together = groups(split, n_groups, shuffle)
    for epoch in range(3 * n_groups):
        assert sorted(i for group in together for i in group.order(epoch)) == list(range(5))
    for group in together:
        for cycle in range(3):
            epochs = range(cycle * n_groups, (cycle + 1) * n_groups)
            assert sorted(i for epoch in epochs for i in group.order(epoch)) == list(range(5))


def test_shuffle_depends_on_seed_and_epoch_and_can_be_off(split: Split) -> None:
    (group,) = groups(split, 1)
    (other,) = groups(split, 1, seed=1)
    orders = [tuple(group.order(epoch)) for epoch in range(6)] + [tuple(other.order(epoch)) for epoch in range(6)]
    assert len(set(orders)) > 8
    (plain,) = groups(split, 1, shuffle=False)
    assert all(plain.order(epoch) == [0, 1, 2, 3, 4] for epoch in range(3))
    texts = [document.text for document in islice(plain.documents(START), 34)]
    assert texts == list(split.documents())


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(split: Split) -> None:
    (group,) = groups(split, 1)
    stream = [document.text for document in islice(group.documents(START), 68)]
    first, second = stream[:34], stream[34:]
    assert sorted(first) == sorted(second) == sorted(split.documents())
    assert first != second
    big = [text for text in first if text.startswith("<2.")]
    assert big != sorted(big, key=lambda text: int(text[3:].split(">")[0]))  # inside a shard too


@pytest.mark.parametrize("limit", [4, 256])
def test_reading_starts_again_at_any_block(split: Split, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_DOCUMENTS", limit)
    (group,) = groups(split, 1)
    stream = list(islice(group.documents(START), 80))
    assert [document.ordinal for document in stream] == list(range(80))
    for document in stream:
        again = group.documents(document.place)
        assert next(again) == stream[document.place.ordinal]
        assert next(again) == stream[document.place.ordinal + 1] if document.place.ordinal < 79 else True


def test_blocks_are_bounded_by_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_CHARACTERS", 100)
    write_jsonl(tmp_path / "a.jsonl", ["x" * 60] * 7)
    (group,) = groups(Split(data(tmp_path).source.build(), 0.0, held_out=False), 1)
    places = [document.place.block for document in islice(group.documents(START), 7)]
    assert places == [0, 0, 2, 2, 4, 4, 6]


def test_held_out_documents_are_the_ones_training_never_sees(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [400, 300, 300])
    subject = config.source.build()
    train = set(Split(subject, 0.2, held_out=False).documents())
    held = set(Split(subject, 0.2, held_out=True).documents())
    assert len(train) + len(held) == 1000
    assert not train & held
    assert 150 < len(held) < 250
    more = set(Split(subject, 0.3, held_out=True).documents())
    assert held < more  # the same hash, another limit
    (group,) = groups(Split(subject, 0.2, held_out=False), 1)
    assert {document.text for document in islice(group.documents(START), 3000)} == train


def test_held_out_split_does_not_depend_on_where_the_data_is_stored(tmp_path: Path) -> None:
    texts = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        config = write_corpus(tmp_path / name, [100, 100])
        texts.append(list(Split(config.source.build(), 0.1, held_out=True).documents()))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rows", [[], [None], ["", "", None]])
def test_a_source_without_text_is_an_error_and_no_endless_loop(rows: list[str | None], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows)
    split = Split(source(type="files", path=str(tmp_path)), 0.0, held_out=False)
    with pytest.raises(ConfigError, match="no document to train on") as caught:
        split.require_documents()
    assert (f"{2 * len(rows)} are empty" in str(caught.value)) == bool(rows)
    with pytest.raises(ConfigError, match="no document is left"):
        next(groups(split, 2)[0].documents(START))


def test_a_group_whose_shards_are_empty_in_one_epoch_waits_for_the_next(tmp_path: Path) -> None:
    for shard in range(4):
        write_jsonl(tmp_path / f"{shard}.jsonl", ["only"] if shard == 3 else [""])
    split = Split(data(tmp_path).source.build(), 0.0, held_out=False)
    split.require_documents()
    for group in groups(split, 4):
        assert [document.text for document in islice(group.documents(START), 3)] == ["only"] * 3
