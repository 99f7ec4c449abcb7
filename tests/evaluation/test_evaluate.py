"""`python -m titan_lite.run.evaluate` against losses made of transformers' logits on the exported folder."""

from __future__ import annotations

import io
import json
import math
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import WorkerPool
from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from tests.models.memory.test_long_term import T, memory_of, model_with, stream, tokens
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.evaluation.scoring import MemoryScorer, WindowScorer
from titan_lite.hf.export import export
from titan_lite.hf.loaded import load_theirs
from titan_lite.hf.verify import quiet_transformers
from titan_lite.run.evaluate import main

CPU = torch.device("cpu")
SIZE, STRIDE = 24, 10
TEXTS = [
    "Grüße aus dem Text, der länger ist als ein Fenster: er hat viele Bytes.",
    "short",
    "x" * 25,
    "日本語 \n\n end",
]
ATOL = 1e-4
"""Losses of some nats per token, by logits within 1e-5."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("run"), model_tables("llama3"))


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "model"
    export(run, out, verified=False)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first text as a file of its own, the others as rows of another."""
    where = tmp_path_factory.mktemp("texts")
    (where / "one.txt").write_text(TEXTS[0])
    (where / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    return [str(where / "one.txt"), str(where / "rows.jsonl")]


def printed(*arguments: object) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(list(map(str, arguments))) == 0
    return out.getvalue()


@torch.no_grad()
def expected(model: Any, text: str, begin: int) -> list[float]:
    """Each token's loss, one forward for each: of a window that ends behind it, at a multiple of the stride."""
    ids = [begin, *text.encode()]
    losses = []
    for i in range(1, len(ids)):
        behind = max(0, math.ceil((i - SIZE) / STRIDE))
        start = max(0, min(len(ids), SIZE + 1 + behind * STRIDE) - 1 - SIZE)
        logits = model(torch.tensor([ids[start:i]])).logits[0, -1].double()
        losses.append((logits.logsumexp(-1) - logits[ids[i]]).item())
    return losses


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_against_transformers(run: Path, folder: Path, files: list[str], kind: str, tmp_path: Path) -> None:
    with quiet_transformers():
        model = load_theirs(folder)
    losses = [expected(model, text, begin=0xFE) for text in TEXTS]
    lines = tmp_path / "documents.jsonl"
    options = ("--seq-len", SIZE, "--stride", STRIDE, "--batch-size", 3, "--documents", lines, "--token-losses")
    told = json.loads(printed(run if kind == "checkpoint" else folder, "--text", *files, *options, "--json"))
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["file"], line["row"]) for line in found] == [("one.txt", 0), *(("rows.jsonl", i) for i in range(3))]
    for line, text, wanted in zip(found, TEXTS, losses, strict=True):
        assert line["ids"] == list(text.encode())
        assert line["losses"] == pytest.approx(wanted, abs=ATOL)
        assert line["loss"] == pytest.approx(sum(wanted) / len(wanted), abs=ATOL)
        assert line["bits_per_byte"] == pytest.approx(sum(wanted) / math.log(2) / len(text.encode()), abs=ATOL)
    nats, n = sum(map(sum, losses)), sum(map(len, losses))
    assert (told["documents"], told["tokens"], told["bytes"]) == (4, n, n)
    assert told["loss"] == pytest.approx(nats / n, abs=ATOL)
    assert told["perplexity"] == pytest.approx(math.exp(nats / n), rel=ATOL)
    assert told["bits_per_byte"] == pytest.approx(nats / n / math.log(2), abs=ATOL)
    assert told["document_loss"] == pytest.approx(sum(sum(one) / len(one) for one in losses) / 4, abs=ATOL)
    assert told["files"]["one.txt"]["loss"] == pytest.approx(sum(losses[0]) / len(losses[0]), abs=ATOL)
    assert told["files"]["rows.jsonl"]["documents"] == 3


def test_the_table(run: Path, files: list[str]) -> None:
    told = json.loads(printed(run, "--text", *files, "--json"))
    assert (told["seq_len"], told["stride"]) == (128, 64)
    rows = [line.split() for line in printed(run, "--text", *files).splitlines()]
    assert [row[0] for row in rows] == ["file", "one.txt", "rows.jsonl", "all"]
    numbers = (told[key] for key in ("loss", "perplexity", "bits_per_byte", "document_loss"))
    assert rows[3][1:] == ["4", str(told["tokens"]), *(f"{number:.5f}" for number in numbers)]


def test_windows_of_one_batch_do_not_see_each_other() -> None:
    """Also with positions that change with the length of what is read."""
    scaling = {"type": "dynamic_ntk", "original_max_len": 4}
    for changes in ({}, {"attention": {"n_heads": 4, "position": {"scaling": scaling}}}):
        model = tiny_model(init={"type": "normal", "std": 0.3}, **changes)
        texts = [torch.randint(VOCAB, (n,)).tolist() for n in (9, 3, 30, 5, 5, 1, 17)]
        alone = list(WindowScorer(model, CPU, 8, 4, batch_size=1)(texts))
        for found, wanted in zip(WindowScorer(model, CPU, 8, 4, batch_size=4)(texts), alone, strict=True):
            torch.testing.assert_close(found.losses, wanted.losses, atol=ATOL, rtol=0)
            assert torch.equal(found.likeliest, wanted.likeliest)


@torch.no_grad()
def test_a_memory_carries_over_segments() -> None:
    model = model_with()
    text = tokens(3 * T, 1)
    segments = list(text[:, :-1].split(T, dim=1))[:2]
    logits = torch.cat(list(stream(model, memory_of(model), segments)), dim=1)[0].double()
    wanted = logits.logsumexp(-1) - logits.gather(-1, text[0, 1 : 2 * T + 1, None])[:, 0]
    (found,) = MemoryScorer(model, CPU, memory_of(model), T)([text[0].tolist()])
    torch.testing.assert_close(found.losses[: 2 * T], wanted, atol=ATOL, rtol=0)
    assert len(found.losses) == 3 * T - 1


def on_ranks(arguments: list[str]) -> str:
    os.environ["WORLD_SIZE"] = "2"
    try:
        return printed(*arguments)
    finally:
        del os.environ["WORLD_SIZE"]


def test_two_ranks_with_half_of_the_model_each(pool2: WorkerPool, run: Path, files: list[str]) -> None:
    alone = json.loads(printed(run, "--text", *files, "--json"))
    first, second = pool2.run(on_ranks, [str(run), "--text", *files, "--json", "--tensor-parallel", "2"], timeout=120)
    assert second == ""
    assert json.loads(first)["loss"] == pytest.approx(alone["loss"], abs=ATOL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "one.txt", "--stride", "200"), "--stride = 200\n    would leave out tokens between windows of 128"),
        (("--text", "one.txt", "no.txt", "a.pdf"), "there is no "),
        (("--text", "one.txt", "a.pdf"), "has no known ending\n    allowed: .txt, .jsonl"),
        (("--text", "empty.txt", "--documents", "out.jsonl"), "holds no text"),
        (("--text", "one.txt", "--documents", "one.txt"), "cannot be made: File exists"),
        (("--text", "one.txt", "--token-losses"), "--token-losses has no effect without --documents"),
        (("--text", "one.txt", "--seq-len", "0"), "--seq-len 0: allowed is at least 1"),
    ],
)
def test_what_is_refused(
    run: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("one.txt", "text"), ("empty.txt", ""), ("a.pdf", "text")):
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main([str(run), *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "empty.txt", "one.txt"]
