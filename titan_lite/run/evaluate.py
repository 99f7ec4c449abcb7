"""How likely a model finds texts: losses, perplexity and bits per byte of local files.

    python -m titan_lite.run.evaluate CHECKPOINT_OR_HF_DIR --text FILE [FILE ...] [options]

Files are .txt (one document each), .jsonl, .jsonl.gz, .jsonl.zst or .parquet (a document per row), folders or globs.
Each document is read from its beginning, behind the token with which documents begin; that it ends is not scored. A
document longer than a window is read in windows that overlap: each token but those of the first window is predicted
from more than seq-len - stride tokens before it. Models with a memory read each document once, in segments.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, NOT_ALLOWED, ConfigError, Problem, main_guard

if TYPE_CHECKING:
    from rich.progress import Progress

    from titan_lite.data.sources.files import Files
    from titan_lite.evaluation.scoring import Scores
    from titan_lite.evaluation.totals import Totals
    from titan_lite.pretrained import Pretrained

BATCH_SIZE = 8


class Document(NamedTuple):
    """A text and where it stands."""

    file: str
    row: int
    text: str
    ids: list[int]


def parse(given: list[str] | None) -> argparse.Namespace:
    """The command line, with what argparse itself can check."""
    parser = argparse.ArgumentParser(
        prog="python -m titan_lite.run.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT_OR_HF_DIR",
        help="a step-N folder, a checkpoint or dump folder (its newest step), or a Hugging Face folder",
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="what to read")
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="of rows, what holds the text (default: text)"
    )
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens of a window (default: those of the training)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens that a window moves (default: half of it)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help=f"windows that are read at once (default: {BATCH_SIZE})"
    )
    parser.add_argument("--documents", type=Path, metavar="OUT", help="write a line of JSON for each document")
    parser.add_argument("--token-losses", action="store_true", help="... with the loss of each of its tokens, in nats")
    parser.add_argument("--json", action="store_true", help="print one object of JSON, nothing else")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="split the model over the N processes of a torchrun"
    )
    options = parser.parse_args(given)
    for name in ("seq_len", "stride", "batch_size", "tensor_parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: allowed is at least 1")
    if options.token_losses and not options.documents:
        parser.error("--token-losses has no effect without --documents")
    return options


def window_of(options: argparse.Namespace, loaded: Pretrained) -> tuple[int, int]:
    """Size and stride. ConfigError where they do not go together, or with the model."""
    size = options.seq_len or loaded.job.training.seq_len
    if loaded.remembers():
        for name in ("stride", "batch_size"):
            if getattr(options, name) is not None:
                why = "has no effect with a model that has a memory: each document is read once, in segments"
                raise ConfigError.at(f"--{name.replace('_', '-')}", why, getattr(options, name), code=CROSS_FIELD)
    stride = options.stride or max(1, size // 2)
    if stride > size:
        why = f"would leave out tokens between windows of {size}"
        raise ConfigError.at("--stride", why, stride, f"1 to {size}", code=NOT_ALLOWED)
    return size, stride


def source_of(options: argparse.Namespace) -> Files:
    """The files. ConfigError where there are none, or one that is no text."""
    from titan_lite.data.sources.files import Files, local_files, missing
    from titan_lite.data.sources.formats import FORMATS, reader_of

    problems = []
    for entry in options.text:
        found = local_files(entry)
        if not found:
            problems.append(Problem(FILE_MISSING, "--text", missing(entry), entry))
        problems += [
            Problem(NOT_ALLOWED, "--text", "has no known ending", str(path), ", ".join(FORMATS))
            for path in found
            if reader_of(path) is None
        ]
    if problems:
        raise ConfigError(problems)
    config = Files.Config(path=tuple(options.text), text_key=options.text_key)
    built: Files = config.build(key="--text")
    return built


def documents(source: Files, loaded: Pretrained) -> Iterator[Document]:
    """All documents that are not empty, file by file."""
    from titan_lite.data.pieces import prompt_ids

    for file in source.shards():
        for row, text in source.read(file, 0, lambda row: True):
            # Where the tokenizer of a folder puts nothing before a text, its first token is predicted from the token
            # that ends one: something has to stand before it.
            yield Document(file, row, text, prompt_ids(loaded.tokenizer, loaded.job.data.bos, text))


def evaluate(options: argparse.Namespace, loaded: Pretrained, progress: Progress, out: TextIO | None) -> dict[str, Any]:
    """What `--json` prints; a line for each document goes to `out`."""
    from titan_lite.evaluation.scoring import scorer
    from titan_lite.evaluation.totals import Totals

    size, stride = window_of(options, loaded)
    source, waiting = source_of(options), list[Document]()
    score = scorer(loaded, size, stride, options.batch_size or BATCH_SIZE)
    files: dict[str, Totals] = {}
    everything = Totals()
    task = progress.add_task("", total=sum(file.size for file in source.files.values()), loss="")

    def texts() -> Iterator[list[int]]:
        for document in documents(source, loaded):
            waiting.append(document)
            yield document.ids

    for scores in score(texts()):
        document = waiting.pop(0)
        counted = scores.losses.sum().item(), len(scores.losses), len(document.text.encode())
        files.setdefault(document.file, Totals()).add(*counted)
        everything.add(*counted)
        progress.update(task, advance=counted[2], loss=f"{everything.nats / everything.tokens:.4f}")
        if out is not None:
            out.write(json.dumps(line_of(document, scores, options.token_losses), ensure_ascii=False) + "\n")
    if not everything.documents:
        raise ConfigError.at("--text", "holds no text", ", ".join(options.text))
    told: dict[str, Any] = {"model": str(options.checkpoint), "seq_len": size}
    told |= {} if loaded.remembers() else {"stride": stride}
    return told | everything.means() | {"files": {name: totals.means() for name, totals in files.items()}}


def line_of(document: Document, scores: Scores, with_tokens: bool) -> dict[str, Any]:
    """What is written of a document; losses in nats."""
    from titan_lite.evaluation.totals import bits_per_byte

    nats, n, text_bytes = scores.losses.sum().item(), len(scores.losses), len(document.text.encode())
    told: dict[str, Any] = {"file": document.file, "row": document.row, "tokens": n, "bytes": text_bytes}
    told |= {"loss": nats / n, "bits_per_byte": bits_per_byte(nats, text_bytes)}
    if with_tokens:
        told |= {"ids": document.ids[1:], "losses": scores.losses.tolist()}
    return told


def table(told: dict[str, Any]) -> str:
    """The result for people."""
    rows = [("file", "documents", "tokens", "loss", "perplexity", "bits/byte", "loss by document")]
    named = dict(told["files"]) if len(told["files"]) > 1 else {}
    for name, one in (*named.items(), ("all" if named else next(iter(told["files"])), told)):
        numbers = one["loss"], one["perplexity"], one["bits_per_byte"], one["document_loss"]
        rows.append((name, f"{one['documents']:,}", f"{one['tokens']:,}", *(f"{number:.5f}" for number in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(lines)


@main_guard()
def main(given: list[str] | None = None) -> int:
    """Evaluates; returns the exit code."""
    options = parse(given)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from titan_lite.generation.world import connect
    from titan_lite.pretrained import load_pretrained

    world = connect(options.tensor_parallel)
    first = world.rank == 0
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%  loss {task.fields[loss]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with ExitStack() as stack:
        out = stack.enter_context(new_file(options.documents)) if first and options.documents else None
        loaded = load_pretrained(options.checkpoint, world.device, world)
        progress = stack.enter_context(Progress(*columns, *times, console=Console(stderr=True), disable=not first))
        told = evaluate(options, loaded, progress, out)
    world.close()
    if not math.isfinite(told["loss"]):
        print("the model's losses are not finite", file=sys.stderr)
        return 1
    if first:
        print(json.dumps(told, indent=2, ensure_ascii=False) if options.json else table(told))
    return 0


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Opened to be written, and removed where that fails. ConfigError where there is one already: nothing is
    overwritten."""
    try:
        out = path.open("x", encoding="utf-8")
    except OSError as error:
        raise ConfigError.at("--documents", f"cannot be made: {error.strerror}", str(path)) from None
    with out:
        try:
            yield out
        except BaseException:
            path.unlink()
            raise


if __name__ == "__main__":
    sys.exit(main())
