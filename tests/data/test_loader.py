"""Training batches: equal to a plain reference, for every way of sharing them out and at every point of resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tests.data.common import Settings, arrays, batches, data, raw_bytes, take, write_corpus, write_jsonl
from titan_lite.config.errors import ConfigError
from titan_lite.data import lanes, pieces
from titan_lite.data.config import DataConfig
from titan_lite.data.loader import Batch, data_fingerprint, train_batches

LANES = 4
STEPS = 12


def frame(text: str) -> list[int]:
    return [0xFE, *text.encode(), 0xFF]


def reference(documents: list[Iterator[str]], seq_len: int, n: int) -> list[list[Any]]:
    """(tokens, targets, document numbers) of n steps; `documents`: the endless documents of each lane."""
    rows = []
    for lane in documents:
        stream: list[int] = []
        owner: list[int] = []
        for number, text in enumerate(lane):
            stream += frame(text)
            owner += [number] * len(frame(text))
            if len(stream) > n * seq_len:
                break
        cuts = [slice(t * seq_len, (t + 1) * seq_len) for t in range(n)]
        shifted = [slice(cut.start + 1, cut.stop + 1) for cut in cuts]
        # Documents are counted from the one that the row before ended in.
        owners = [[d - (owner[cut.start - 1] if cut.start else -1) for d in owner[cut]] for cut in cuts]
        rows.append([(stream[a], stream[b], own) for a, b, own in zip(cuts, shifted, owners, strict=True)])
    return [[[row[t][part] for row in rows] for part in range(3)] for t in range(n)]


def endless(texts: list[list[str]]) -> Iterator[str]:
    """The shards' documents of one epoch after another; texts[epoch % len]."""
    while True:
        for epoch in texts:
            yield from epoch


def texts_of(folder: Path) -> list[list[str]]:
    """Every shard's documents, read without any code of the package."""
    return [[json.loads(line)["text"] for line in path.open()] for path in sorted(folder.iterdir())]


def mine(config: DataConfig, n_ranks: int, workers: int, steps: int = STEPS, **keys: Any) -> list[list[Any]]:
    """The global batches, put together from those of `n_ranks` ranks."""
    share = LANES // n_ranks
    ranks = []
    cursors = keys.pop("cursors", None)
    for rank in range(n_ranks):
        rows = range(rank * share, (rank + 1) * share)
        own = None if cursors is None else [cursors[row] for row in rows]
        ranks.append(take(batches(config, rows, LANES, settings=Settings(workers), cursors=own, **keys), steps))
    return [
        [list(chain(*parts)) for parts in zip(*map(arrays, step), strict=True)] for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(params=[[17], [9, 4], [3, 1, 8, 5, 6, 2, 9]], ids=["one shard", "two shards", "seven shards"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """Fewer shards than lanes, and more; small enough for several epochs."""
    return write_corpus(tmp_path, request.param).model_copy(update={"held_out": 0.0})


def test_one_shard_equals_the_plain_reference(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [10]).model_copy(update={"held_out": 0.0, "shuffle": False})
    (shard,) = texts_of(tmp_path)
    lanes_of = [islice(endless([shard]), lane, None, LANES) for lane in range(LANES)]
    found = [arrays(batch)[:3] for batch in take(batches(config, range(LANES), LANES), 30)]
    assert found == reference(lanes_of, 16, 30)


def test_many_shards_equal_the_plain_reference(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [3, 1, 8, 5, 6, 2, 9]).model_copy(update={"held_out": 0.0, "shuffle": False})
    shards = texts_of(tmp_path)
    by_epoch = [[list(chain(*shards[(lane + epoch) % 4 :: 4])) for epoch in range(4)] for lane in range(LANES)]
    found = [arrays(batch)[:3] for batch in take(batches(config, range(LANES), LANES), 60)]
    assert found == reference([endless(epochs) for epochs in by_epoch], 16, 60)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_ranks_and_workers(corpus: DataConfig) -> None:
    expected = mine(corpus, 1, 0)
    assert all(mine(corpus, n, workers) == expected for n, workers in [(2, 0), (4, 0), (1, 2), (2, 2), (1, 3)])


def test_resuming_at_any_step_on_any_ranks_gives_the_same_batches(corpus: DataConfig) -> None:
    expected = mine(corpus, 1, 0)
    for step in range(STEPS - 1):
        cursors = json.loads(json.dumps(expected[step][3]))
        for n in (1, 2, 4):
            assert mine(corpus, n, 0, STEPS - 1 - step, cursors=cursors) == expected[step + 1 :]
    assert mine(corpus, 1, 2, STEPS - 4, cursors=expected[3][3]) == expected[4:]


def test_rows_continue_themselves_and_number_their_documents(corpus: DataConfig) -> None:
    found = take(batches(corpus, range(LANES), LANES), STEPS)
    for batch, following in pairwise(found):
        assert following.tokens[:, 0].tolist() == batch.targets[:, -1].tolist()
    for batch in found:
        assert [batch.tokens.dtype, batch.targets.dtype, batch.documents.dtype] == [
            torch.int64,
            torch.int64,
            torch.int32,
        ]
        assert batch.tokens[:, 1:].tolist() == batch.targets[:, :-1].tolist()
        assert batch.documents[:, 0].tolist() == (batch.tokens[:, 0] == 0xFE).int().tolist()  # 1 where one begins
        ends = (batch.tokens[:, :-1] == 0xFF).int()
        assert batch.documents.diff(dim=1).tolist() == ends.tolist()  # the next document begins after each end of text
        assert int(batch.targets.min()) >= 0


def test_the_data_of_a_seed_is_written_down(tmp_path: Path) -> None:
    """Guards runs that are resumed with a later version: the batches of a given configuration never change."""
    config = write_corpus(tmp_path, [40, 30, 20])
    found = [arrays(batch) for batch in take(batches(config, range(8), 8, seed=7), 40)]
    assert xxhash.xxh3_64_hexdigest(json.dumps(found).encode()) == "0b8677a30d7f5720"


def test_seed_and_shuffle_change_the_order(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [40, 30, 20])
    first = [arrays(take(batches(c, range(4), 4, seed=seed), 1)[0])[0] for c, seed in _variants(config)]
    assert all(a != b for i, a in enumerate(first) for b in first[:i])


def _variants(config: DataConfig) -> list[tuple[DataConfig, int]]:
    return [(config, 0), (config, 1), (config.model_copy(update={"shuffle": False}), 0)]


def test_held_out_documents_never_come(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [30, 30]).model_copy(update={"held_out": 0.3})
    seen = b"".join(
        bytes(row) for batch in take(batches(config, range(4), 4, seq_len=64), 60) for row in batch.tokens.tolist()
    )
    split = {name: name.encode() in seen for name in (f"<{s}.{r}>" for s in range(2) for r in range(30))}
    assert 8 <= sum(not came for came in split.values()) <= 28


def test_a_lane_far_behind_reads_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [300, 3, 5, 4] * 8  # lane 0 gets all long documents, so that the others run ahead
    write_jsonl(tmp_path / "a.jsonl", ["x" * n + str(i) for i, n in enumerate(sizes)])
    config = data(tmp_path, held_out=0.0, shuffle=False)
    expected = [arrays(batch) for batch in take(batches(config, range(4), 4), 100)]
    monkeypatch.setattr(lanes, "QUEUED_CHARACTERS", 700)
    opened = []
    original = lanes.Reader.__init__

    def counting(self: lanes.Reader, *args: Any) -> None:
        opened.append(args)
        original(self, *args)

    monkeypatch.setattr(lanes.Reader, "__init__", counting)
    assert [arrays(batch) for batch in take(batches(config, range(4), 4), 100)] == expected
    assert len(opened) > 1
    opened.clear()
    monkeypatch.setattr(lanes, "QUEUED_CHARACTERS", 100)
    take(batches(config, range(1), 1), 100)  # a lane alone has nobody to fall behind, however long its documents are
    assert len(opened) == 1


def test_a_20_mb_document_is_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {i}\n" for i in range(1_700_000))
    assert len(text) > 20_000_000
    (tmp_path / "big.txt").write_text(text)
    subject = raw_bytes()
    sizes = []
    encode = subject.encode
    monkeypatch.setattr(subject, "encode", lambda text, continued: sizes.append(len(text)) or encode(text))

    def start(cursors: Any) -> Any:
        return train_batches(
            data(tmp_path, held_out=0.0), subject, seq_len=1 << 20, lanes=1, rows=range(1), seed=0,
            settings=Settings(), cursors=cursors,
        )  # fmt: skip

    found = take(start(None), 20)
    stream = b"".join(batch.tokens[0].numpy().astype("uint8").tobytes() for batch in found)
    assert stream == bytes(frame(text) * 2)[: len(stream)]
    assert max(sizes) <= pieces.PIECE + pieces.REACH
    sizes.clear()
    assert torch.equal(take(start(found[10].cursors), 1)[0].tokens, found[11].tokens)
    assert sum(sizes) < 2 << 20  # going on inside the document does not encode it from its beginning


def test_resuming_reads_from_the_current_shard_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_corpus(tmp_path, [20] * 12).model_copy(update={"held_out": 0.0})
    found = take(batches(config, range(1), 1), 300)
    read: list[str] = []
    kind = type(config.source.build())
    original = kind.read

    def recording(self: Any, shard: str, start: int, keep: Any) -> Any:
        read.append(shard)
        return original(self, shard, start, keep)

    loader = batches(config, range(1), 1, cursors=found[290].cursors)
    monkeypatch.setattr(kind, "read", recording)
    assert arrays(next(loader)) == arrays(found[291])
    assert found[290].cursors[0]["position"] >= 4
    assert len(read) <= 2


def test_dropped_documents_are_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a", "", None, "b", ""])
    loader = batches(data(tmp_path, held_out=0.0, shuffle=False), range(1), 1, seq_len=4)
    assert [batch.dropped for batch in take(loader, 4)] == [3, 6, 9, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_arrives_as_the_config_error_it_is(workers: int, tmp_path: Path) -> None:
    texts: list[str | None] = ["good" * 20] * 300
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + "{bad\n")
    loader = batches(data(tmp_path), range(2), 2, settings=Settings(workers))
    with pytest.raises(ConfigError, match="line 301: not valid JSON") as caught:
        take(loader, 10_000)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_source_is_an_error_at_once(workers: int, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", None])
    with pytest.raises(ConfigError, match="no document to train on"):
        batches(data(tmp_path), range(2), 2, settings=Settings(workers))


def test_cursors_of_other_rows_and_of_changed_data_are_refused(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [20, 20])
    (batch,) = take(batches(config, range(4), 4), 1)
    with pytest.raises(ConfigError, match="cursor of batch row 0"):
        take(batches(config, range(4), 4, cursors=batch.cursors[::-1]), 1)
    with pytest.raises(ConfigError, match="cursor of batch row 0"):
        take(batches(config, range(1), 4, cursors=[{"lane": 0}]), 1)
    far: Batch = take(batches(config, range(4), 4), 3)[2]
    for path in tmp_path.iterdir():
        path.write_text('{"text": "a"}\n' * 40)
    with pytest.raises(ConfigError, match="the data changed"):
        take(batches(config, range(4), 4, cursors=far.cursors), 1)


def test_fingerprint_covers_what_decides_the_batches(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [5])
    prints = [data_fingerprint(config)]
    prints += [
        data_fingerprint(config.model_copy(update=change))
        for change in ({"held_out": 0.5}, {"shuffle": False}, {"bos": True})
    ]
    (tmp_path / "more.jsonl").write_text('{"text": "a"}\n')
    prints.append(data_fingerprint(config))
    assert len(set(prints)) == 5
    assert data_fingerprint(config) == prints[-1]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Any, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


TRAINER = """
import sys, time
from tests.data.common import Settings, batches, data
loader = batches(data(sys.argv[1]), range(2), 2, settings=Settings(2))
next(loader)
print("ready", flush=True)
for line in sys.stdin:
    print(next(loader).tokens.sum().item(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and PR_SET_PDEATHSIG")
def test_workers_ignore_stop_signals_and_die_with_their_trainer(tmp_path: Path) -> None:
    write_corpus(tmp_path, [20, 20])
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    ) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        workers = children(trainer.pid)
        assert len(workers) == 2
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(worker, number)
        for _ in range(10):  # beyond what was loaded ahead
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            assert int(trainer.stdout.readline()) > 0
        trainer.kill()
    assert wait_until(lambda: not any(map(alive, workers)))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_close_and_the_end_of_the_program_leave_no_worker(tmp_path: Path) -> None:
    config = write_corpus(tmp_path, [20, 20])
    before = set(children(os.getpid()))
    loader = batches(config, range(2), 2, settings=Settings(2))
    next(loader)
    assert len(set(children(os.getpid())) - before) == 2
    loader.close()
    assert wait_until(lambda: not set(children(os.getpid())) - before)
    loader.close()
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        input="\n",
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
