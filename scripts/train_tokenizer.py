#!/usr/bin/env python
"""Trains a tokenizer on any data source of titan_lite.

    python scripts/train_tokenizer.py --type bpe --vocab-size 4096 --out outputs/tokenizer
    python scripts/train_tokenizer.py --type unigram --vocab-size 8192 --out my/tokenizer --source 'my/*.jsonl.zst'

bpe writes `tokenizer.json` and `tokenizer_config.json` (Hugging Face tokenizers, byte level); in a training file:
`tokenizer = {type = "huggingface", path = "OUT"}`. unigram writes `tokenizer.model` (SentencePiece with byte fallback):
`tokenizer = {type = "sentencepiece", path = "OUT/tokenizer.model"}`. Both give back every text exactly and have an end
of text. Documents held out for validation are not read; shards are read in random order, so that `--max-documents` is
a sample.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from titan_lite.config.datasets import source_table
from titan_lite.config.errors import ConfigError, main_guard
from titan_lite.data.config import DataConfig
from titan_lite.data.documents import Split, permutation
from titan_lite.data.pieces import piece_end
from titan_lite.data.source import Source

BPE_END = "<|endoftext|>"
SMALLEST = {"bpe": 257, "unigram": 300}
"""256 bytes and the end of text; SentencePiece needs its three specials and some pieces more."""
LONGEST_SENTENCE = 1 << 16
"""Bytes; SentencePiece trains on lines, and skips longer ones."""


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.vocab_size < SMALLEST[args.type]:
        raise ConfigError.at("--vocab-size", "too small", args.vocab_size, f"at least {SMALLEST[args.type]}")
    out = Path(args.out)
    names = ["tokenizer.json", "tokenizer_config.json"] if args.type == "bpe" else ["tokenizer.model"]
    taken = [name for name in names if (out / name).exists()]
    if taken:
        raise ConfigError.at("--out", f"holds {taken[0]} already, which is not overwritten", value=args.out)
    split = Split(source_of(args), DataConfig().held_out, held_out=False)
    split.require_documents()
    texts = sample(split, args.seed)
    if args.max_documents is not None:
        texts = islice(texts, args.max_documents)
    print(f"{args.type} with {args.vocab_size:,} tokens from {split.source.describe()}", file=sys.stderr)
    files = (train_bpe if args.type == "bpe" else train_unigram)(texts, args.vocab_size, args.max_documents)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(out / name, content)
        print(out / name)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=["bpe", "unigram"], required=True)
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens, end of text included")
    parser.add_argument("--out", required=True, help="folder to write to; files there are never overwritten")
    parser.add_argument("--source", default="python_stdlib", help="python_stdlib, c4, hf:org/name, or a path or glob")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: text)")
    parser.add_argument("--max-documents", type=int, help="read at most so many documents (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which shards are read (default: 0)")
    return parser.parse_args(arguments)


def source_of(args: argparse.Namespace) -> Source:
    """The data source that --source stands for, spelled as in training.dataset, or a folder or file."""
    table = source_table(args.source, "") or ({"type": "files", "path": args.source} if args.source else None)
    if table is None:
        raise ConfigError.at("--source", "names no data source", value=args.source)
    if table["type"] != "python_stdlib":
        table["text_key"] = args.text_key
    return Source.Config.choose(table).build(key="--source")


def sample(split: Split, seed: int) -> Iterator[str]:
    """The split's documents, shards in random order."""
    shards = split.source.shards()
    for i in permutation(len(shards), f"tokenizer {seed}"):
        for _, text in split.source.read(shards[i], 0, split.keep(shards[i])):
            yield text


def train_bpe(texts: Iterator[str], vocab_size: int, total: int | None) -> dict[str, bytes]:
    """Byte-level BPE, words split as GPT-2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BPE_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress() as bar:
        tokenizer.train_from_iterator(pieces(counted(texts, total, bar)), trainer=trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        why = f"the text has pairs of tokens for no more than {size} tokens"
        raise ConfigError.at("--vocab-size", why, vocab_size, f"at most {size}, or more text")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": BPE_END, "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def train_unigram(texts: Iterator[str], vocab_size: int, total: int | None) -> dict[str, bytes]:
    """SentencePiece unigram without normalization; what no piece covers is spelled in bytes."""
    import sentencepiece

    model = io.BytesIO()
    with progress() as bar:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(counted(texts, total, bar)),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=LONGEST_SENTENCE,
                num_threads=os.cpu_count() or 1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError.at("--vocab-size", f"SentencePiece cannot train it: {error}", vocab_size) from error
    return {"tokenizer.model": model.getvalue()}


def pieces(texts: Iterator[str]) -> Iterator[str]:
    """Long documents in pieces, as they are encoded in training."""
    for text in texts:
        start = 0
        while start < len(text):
            end = piece_end(text, start)
            yield text[start:end]
            start = end


def lines(texts: Iterator[str]) -> Iterator[str]:
    """The lines that are not empty, longer ones cut."""
    longest = LONGEST_SENTENCE // 4  # bytes per character at most
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), longest):
                yield line[start : start + longest]


def counted(texts: Iterator[str], total: int | None, bar: Progress) -> Iterator[str]:
    """The texts, shown on the bar as they are read; what comes after the last one is the training itself."""
    task = bar.add_task("reading documents", total=total)
    for text in texts:
        yield text
        bar.advance(task)
    bar.update(task, total=bar.tasks[task].completed)
    bar.add_task("training", total=None)


def progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def write(path: Path, content: bytes) -> None:
    """A new file, never over one that appeared meanwhile."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        raise ConfigError.at("--out", f"{path} exists already and is not overwritten") from error


if __name__ == "__main__":
    with main_guard():
        main()
