"""The command line of scripts/generate.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from titan_lite.generation.sampling import Sampling
from titan_lite.generation.steps import STEPS

TEMPERATURE = 0.8
"""Where the command line gives none."""
BATCH_SIZE = 8
"""The same."""
OF_DRAWS = ("seed", "samples")
"""Options that have no effect where nothing is drawn."""


def parse(given: Sequence[str] | None, doc: str | None) -> argparse.Namespace:
    """The options, `sampling` and `prompt` (a list of texts, or None where there is none) among them.

    Exits with 2 where one is not allowed, or cannot take effect beside another.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_texts(parser)
    _add_choices(parser)
    _add_machine(parser)
    options = parser.parse_args(given)
    _check_numbers(parser, options)
    _check_together(parser, options)
    if options.temperature is None:
        options.temperature = 0.0 if options.beams else TEMPERATURE
    for step in STEPS:
        if getattr(options, step.name) is None:
            setattr(options, step.name, step.off)
    options.sampling = Sampling.of(options)
    for name in options.sampling.idle():
        parser.error(f"{_flag(name)} has no effect with --temperature 0: nothing is drawn")
    for name, default in (("seed", 0), ("samples", 1), ("batch_size", BATCH_SIZE), ("length_penalty", 1.0)):
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT_OR_HF_DIR",
        help="a step-N folder, a checkpoint or dump folder (its newest step), or a Hugging Face folder",
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times")
    texts.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a prompt per line; of a .jsonl file a string, or {"prompt": ...}'
    )
    texts.add_argument(
        "--chat",
        action="store_true",
        help="prompts are messages, in the tokenizer's chat template; without one, a conversation in the terminal",
    )
    texts.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most, for each (default: 128)")
    texts.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this; may be given several times"
    )
    texts.add_argument("--samples", type=int, metavar="N", help="continuations of each prompt (default: 1)")
    texts.add_argument("--json", action="store_true", help="print a line of JSON for each continuation, nothing else")


def _add_choices(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_argument_group("choice of tokens")
    for step in STEPS:
        default = TEMPERATURE if step.name == "temperature" else step.off
        choices.add_argument(_flag(step.name), type=step.kind, metavar="X", help=f"{step.what} (default: {default:g})")
    choices.add_argument(
        "--seed", type=int, metavar="N", help="same seed, same text; further --samples have the next ones (default: 0)"
    )
    choices.add_argument("--beams", type=int, metavar="N", help="beam search with so many beams in place of drawing")
    choices.add_argument(
        "--length-penalty", type=float, metavar="X", help="scores of beams are divided by length ** this (default: 1)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size", type=int, metavar="N", help=f"texts that are continued side by side (default: {BATCH_SIZE})"
    )
    machine.add_argument(
        "--ahead", action="store_true", help="let the model's multi-token prediction guess: the same text, faster"
    )
    machine.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="split the model over the N processes of a torchrun"
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    rules = [(step.name, step.legal, step.allowed) for step in STEPS]
    counts = ("max_new_tokens", "samples", "batch_size", "tensor_parallel")
    rules += [(name, lambda value: value > 0, "at least 1") for name in counts]
    rules += [
        ("seed", lambda value: 0 <= value < 2**63, "0 to 2^63 - 1"),
        ("beams", lambda value: value > 1, "at least 2"),
        ("length_penalty", lambda value: abs(value) < float("inf"), "a number"),
    ]
    for name, legal, allowed in rules:
        value = getattr(options, name)
        if value is not None and not legal(value):
            parser.error(f"{_flag(name)} {value}: allowed is {allowed}")
    for name, texts in (("prompt", options.prompt or []), ("stop", options.stop)):
        if any("\udc80" <= character <= "\udcff" for text in texts for character in text):
            parser.error(f"--{name}: is not valid UTF-8")
    if "" in options.stop:
        parser.error("--stop: an empty text is everywhere")


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.prompt and options.prompts:
        parser.error("--prompt and --prompts: allowed is one of them")
    if not (options.prompt or options.prompts or options.chat):
        parser.error("nothing to continue: give --prompt, --prompts or --chat")
    talks = options.chat and not (options.prompt or options.prompts)
    draws = [step.name for step in STEPS if step.for_drawing]
    greedy = options.temperature == 0
    for holds, where, idle in (
        (talks, "in a conversation: give --prompt or --prompts", ("samples", "json", "batch_size", "beams")),
        (not options.beams, "without --beams", ("length_penalty",)),
        (options.beams, "with --beams: nothing is drawn", (*draws, *OF_DRAWS)),
        (options.beams, "with --beams, which searches for one text after the other", ("batch_size", "ahead")),
        (options.ahead, "with --ahead, which continues one text after the other", ("batch_size",)),
        (greedy, "with --temperature 0: nothing is drawn", OF_DRAWS),
    ):
        for name in idle if holds else ():
            value = getattr(options, name)
            if value is not None and value is not False:  # a 0 was given
                parser.error(f"{_flag(name)} has no effect {where}")
    if options.beams and options.stop:
        parser.error("--stop is not available with --beams")
