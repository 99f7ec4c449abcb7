"""Runs that end with a Hugging Face folder, and that start from one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.checkpoint.state import model_tensors
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job
from titan_lite.data.pieces import prompt_ids
from titan_lite.generation import Sampling, generate
from titan_lite.hf.export import export
from titan_lite.hf.fill import fill, opened
from titan_lite.hf.importer import import_folder
from titan_lite.hf.loaded import load_theirs
from titan_lite.models.transformer import Transformer
from titan_lite.pretrained import load_pretrained
from titan_lite.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def trained(config: Path, *overrides: str) -> str:
    """A run in a process of its own; what it says."""
    command = [sys.executable, "-m", "titan_lite.train", str(config), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_trained_model_goes_on_alike_here_and_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ("--training.steps=6", "--training.seq_len=64", "--validation.enable=false", "--generation.prompts=[]")
    save = ("--checkpoint.async_mode=disabled", "--checkpoint.last_save_in_hf=true")
    said = trained(ROOT / "train_configs" / "debug.toml", f"--job.dump_folder={run}", *small, *save)
    assert "hf-step-6" in said
    assert not any(noise in said for noise in ("torchao", "pytree"))  # which transformers imports
    from transformers import AutoTokenizer

    model, tokenizer, job = load_pretrained(run, CPU)
    ids = prompt_ids(tokenizer, job.data.bos, "def main(")
    ours = list(generate(model, ids, 48, Sampling(temperature=0.0), 0, CPU, 256, [tokenizer.eos_id]))
    theirs = AutoTokenizer.from_pretrained(run / "hf-step-6")
    prompt = theirs("def main(", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [ids]
    made = load_theirs(run / "hf-step-6").generate(**prompt, max_new_tokens=48, do_sample=False)[0, len(ids) :].tolist()
    assert made[: len(ours)] == ours
    assert made[len(ours) :] in ([], [tokenizer.eos_id])

    import_folder(run / "hf-step-6", tmp_path / "back")
    job = load_job(tmp_path / "back" / "config.toml")
    assert job.checkpoint.initial_load_path == str(tmp_path / "back" / "checkpoint" / "step-0")
    again, _, _ = load_pretrained(tmp_path / "back", CPU)
    for name, tensor in model.named_parameters():
        assert torch.equal(again.get_parameter(name), tensor)


def test_the_folder_of_a_run_has_the_type_that_is_asked_for(tmp_path: Path) -> None:
    run = save_random(tmp_path / "run", model_tables("llama3"))
    trainer = Trainer.__new__(Trainer)
    trainer.job = job_from_dict({"checkpoint": {"enable": True, "last_save_in_hf": True, "export_dtype": "bfloat16"}})
    assert not any("export_dtype" in told for told in trainer.job.warnings)
    trainer.folder, trainer.checkpoints = run, SimpleNamespace(folder=run / "checkpoint")
    trainer.progress = SimpleNamespace(step=7)
    trainer._export()
    assert json.loads((run / "hf-step-7" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_is_filled_from_a_folder(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("gemma2"))
    export(tmp_path / "run", tmp_path / "hf", verified=False)
    wanted, _, job = load_pretrained(tmp_path / "run", CPU)
    model: Transformer = job.model.build(vocab_size=256)
    fill(opened(tmp_path / "hf", job.model), model_tensors(model))
    for name, tensor in wanted.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), tensor, atol=1e-6, rtol=0)


def test_a_run_of_another_model_is_not(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("llama3"))
    export(tmp_path / "run", tmp_path / "hf", verified=False)
    other = Transformer.Config.model_validate(model_tables("llama3", norm={"eps": 0.1}) | {"flavor": ""})
    with pytest.raises(ConfigError, match=r"model.norm.eps = 0.1\n.*is another model than the llama model in"):
        opened(tmp_path / "hf", other)
    larger: Transformer = load_pretrained(tmp_path / "run", CPU).job.model.build(vocab_size=320)
    same = load_pretrained(tmp_path / "run", CPU).job.model
    with pytest.raises(ConfigError, match=r"the folder has .* for embedding.weight"):
        fill(opened(tmp_path / "hf", same), model_tensors(larger))
