#!/usr/bin/env python
"""Samples text from a checkpoint: scripts/generate.py CHECKPOINT --prompt TEXT [options]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from titan_lite.config.errors import main_guard


def arguments() -> argparse.Namespace:
    """The command line, with what argparse itself can check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="a step-N folder, or a checkpoint or dump folder (its newest step)"
    )
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to sample at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0 = all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest with this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    options = parser.parse_args()
    for name, legal, allowed in (
        ("max_new_tokens", options.max_new_tokens > 0, "at least 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "0 or more"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0, at most 1"),
        ("seed", 0 <= options.seed < 2**63, "0 to 2^63 - 1"),
    ):
        if not legal:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: allowed is {allowed}")
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        parser.error("--prompt: is not valid UTF-8")
    return options


@main_guard()
def main(options: argparse.Namespace) -> None:
    """Prints the prompt and its continuation as it comes."""
    from titan_lite.data.pieces import prompt_ids
    from titan_lite.generation import Sampling, generate
    from titan_lite.parallel.precision import DTYPES
    from titan_lite.parallel.world import pick_device
    from titan_lite.pretrained import load_pretrained
    from titan_lite.step import lane_memory

    device = pick_device()
    model, tokenizer, job = load_pretrained(options.checkpoint, device)
    prompt = prompt_ids(tokenizer, job.data.bos, options.prompt)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    tokens: list[int] = []
    shown = ""
    print(options.prompt, end="", flush=True)
    stream = generate(
        model,
        prompt,
        options.max_new_tokens,
        sampling,
        options.seed,
        device,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        memory=lane_memory(job, model, device, DTYPES[job.training.dtype]).decoding(job.training.seq_len),
    )
    for token in stream:
        tokens.append(token)
        # The last characters may still lack their last bytes: they wait until they are whole.
        text = tokenizer.decode(tokens)
        whole = text.rstrip("\ufffd")
        if whole.startswith(shown):
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    print(tokenizer.decode(tokens)[len(shown) :])


if __name__ == "__main__":
    try:
        main(arguments())
    except FloatingPointError as error:
        sys.exit(f"\n{error}")
