"""CPU seconds of generation here and by transformers' generate() on the exported model.

    python benchmarks/generate.py [--rounds 7] [--prompt 64] [--new 128] [--dim 256] [--layers 8] [--sampled]

A Llama with random weights (10 M parameters by default) is saved, exported by the converter and loaded again: by
`load_pretrained` here, by `AutoModelForCausalLM` there, with its default attention. Both continue the same prompts, one
and eight at a time, greedily or by sampling with top-p; greedy tokens are compared. One thread, and the two take turns
within a round. A ratio below 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, spread
from titan_lite.config.load import job_from_dict
from titan_lite.generation import Request, Sampling, decode
from titan_lite.hf.export import export
from titan_lite.hf.folds import Shape
from titan_lite.hf.importer import write_step_zero
from titan_lite.hf.source import InMemory
from titan_lite.models.init import initialize
from titan_lite.models.spec import collect_specs, named_state
from titan_lite.models.transformer import Transformer
from titan_lite.pretrained import Pretrained, load_pretrained

VOCAB = 4096
TOP_P, TEMPERATURE = 0.9, 0.8
CPU = torch.device("cpu")


def save_model(dump: Path, dim: int, layers: int) -> None:
    """A step folder with a Llama as it is before training."""
    tables = {
        "name": "llama3",
        "flavor": "debugmodel",
        "dim": dim,
        "n_layers": layers,
        "vocab_size": VOCAB,
        "attention": {"n_heads": dim // 32, "n_kv_heads": dim // 64},
        "ffn": {"hidden": 3 * dim},
    }
    job = job_from_dict({"model": tables, "training": {"seq_len": 2048}})
    model: Transformer = job.model.build(vocab_size=VOCAB)
    initialize(model, collect_specs(model), job.model.init.build(dim=dim, n_layers=layers), 0)
    tensors = InMemory(dict(named_state(model)))
    assert set(tensors.meta) == set(Shape.of(job.model, VOCAB, 0).meta)
    (dump / "checkpoint").mkdir(parents=True)
    write_step_zero(dump / "checkpoint" / "step-0", tensors, job, job.tokenizer.build().fingerprint(), "llama")


def ours(loaded: Pretrained, prompts: torch.Tensor, new: int, sampled: bool) -> list[list[int]]:
    """The new tokens of each prompt."""
    sampling = Sampling(TEMPERATURE, top_p=TOP_P) if sampled else Sampling(temperature=0)
    engine = dataclasses.replace(loaded.engine(), ends=frozenset())  # both go on to the last token
    requests = [Request(prompt, new, seed=row) for row, prompt in enumerate(prompts.tolist())]
    texts: list[list[int]] = [[] for _ in requests]
    for row, token in decode(engine, requests, sampling):
        texts[row].append(token)
    return texts


def theirs(model: Any, prompts: torch.Tensor, new: int, sampled: bool) -> list[list[int]]:
    """The same by transformers."""
    how = (
        {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0} if sampled else {"do_sample": False}
    )
    mask = torch.ones_like(prompts)
    made = model.generate(prompts, attention_mask=mask, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **how)
    return made[:, prompts.shape[1] :].tolist()


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """CPU seconds, and the tokens."""
    start = time.process_time()
    tokens = run()
    return time.process_time() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("prompt", 64), ("new", 128), ("dim", 256), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sampled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        dump, exported = Path(folder) / "run", Path(folder) / "hf"
        save_model(dump, options.dim, options.layers)
        export(dump, exported, verified=False)
        from transformers import AutoModelForCausalLM

        loaded = load_pretrained(dump, CPU)
        reference = AutoModelForCausalLM.from_pretrained(exported).eval()
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    how = f"top-p {TOP_P}" if options.sampled else "greedy"
    print(f"{machine()}, 1 thread")
    print(f"{parameters:,} parameters, prompts of {options.prompt} tokens, {options.new} new ones, {how}")
    for batch in (1, 8):
        prompts = torch.randint(256, (batch, options.prompt), generator=torch.Generator().manual_seed(batch))
        ways = {
            "ours": lambda prompts=prompts: ours(loaded, prompts, options.new, options.sampled),
            "transformers": lambda prompts=prompts: theirs(reference, prompts, options.new, options.sampled),
        }
        compare(f"batch {batch}", ways, options.rounds, batch * options.new, same=not options.sampled)


def compare(title: str, ways: dict[str, Callable[[], list[list[int]]]], rounds: int, tokens: int, same: bool) -> None:
    """Prints medians and the ratio within rounds; with `same`, whether the tokens are."""
    made = {name: run() for name, run in ways.items()}
    assert not same or made["ours"] == made["transformers"], "greedy tokens differ"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(ways[name])[0])
    for name, values in seconds.items():
        print(f"{title:9} {name:13} {spread(values)} CPU s, {tokens / statistics.median(values):,.0f} tokens per CPU s")
    ratios = [mine / other for mine, other in zip(seconds["ours"], seconds["transformers"], strict=True)]
    print(f"{title:9} ratio         {spread(ratios, 3)}")


if __name__ == "__main__":
    main()
