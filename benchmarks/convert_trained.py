"""A model trained here for real, exported, and a prompt continued here and by transformers: the same tokens?

    python benchmarks/convert_trained.py [--steps 300] [--new-tokens 200] [overrides]

Trains `train_configs/debug.toml` (the source text of Python's standard library) with `checkpoint.last_save_in_hf`, then
loads the checkpoint here and the folder as a user of transformers would, gives both the same prompts as text, and
compares the texts. Ends with exit code 1 where they differ. 2 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine
from titan_lite.data.pieces import prompt_ids
from titan_lite.generation import Sampling, generate
from titan_lite.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("def ", "import os\n", "class Parser:\n    ", "    for i in range(")


def train(run: Path, steps: int, overrides: list[str]) -> None:
    """A run in a process of its own."""
    config = ROOT / "train_configs" / "debug.toml"
    given = (f"--job.dump_folder={run}", f"--training.steps={steps}", "--checkpoint.last_save_in_hf=true")
    command = [sys.executable, "-m", "titan_lite.train", str(config), *given, *overrides]
    subprocess.run(command, cwd=ROOT, check=True)


def continued_here(run: Path, prompt: str, count: int) -> str:
    """The likeliest continuation by our own model."""
    cpu = torch.device("cpu")
    model, tokenizer, job = load_pretrained(run, cpu)
    ids = prompt_ids(tokenizer, job.data.bos, prompt)
    greedy = Sampling(temperature=0.0)
    made = generate(model, ids, count, greedy, 0, cpu, tokenizer.vocab_size, [tokenizer.eos_id])
    return tokenizer.decode([*tokenizer.encode(prompt).tolist(), *made])


def continued_there(folder: Path, prompt: str, count: int) -> str:
    """The same with nothing but transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=count, do_sample=False)
    text: str = tokenizer.decode(made[0], skip_special_tokens=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=200)
    arguments, overrides = parser.parse_known_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        train(run, arguments.steps, overrides)
        folder = run / f"hf-step-{arguments.steps}"
        report = json.loads((folder / "conversion_report.json").read_text())
        print(f"{report['class']}, logits within {report['verified']['max_logit_difference']:.1e}")
        differ = 0
        for prompt in PROMPTS:
            here, there = (
                made(prompt_of, prompt, arguments.new_tokens)
                for made, prompt_of in ((continued_here, run), (continued_there, folder))
            )
            differ += here != there
            print(f"{prompt!r}: {'the same' if here == there else 'another'} {len(here)} characters: {here[:60]!r} ...")
        if differ:
            raise SystemExit(f"{differ} of {len(PROMPTS)} prompts go on differently")


if __name__ == "__main__":
    main()
