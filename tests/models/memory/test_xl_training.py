"""Transformer-XL memory in training: it outlives the process; what it is good for; what does not go with it."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.memory.test_lanes_training import STEPS, XL, go, logged, sections, write_config
from tests.runs import Run, build_tiny, global_batch, train
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job
from titan_lite.run.signals import StopFlag
from titan_lite.step import MicroBatch, step
from titan_lite.trainer import Trainer


@pytest.fixture(scope="module")
def serial() -> Run:
    return train(sections(8, XL), STEPS)


def test_memory_changes_the_training_from_the_second_step_on(serial: Run) -> None:
    without = train(sections(8, "none"), STEPS)
    assert serial.losses[0] == pytest.approx(without.losses[0], rel=1e-6)
    assert serial.losses[1] != pytest.approx(without.losses[1], rel=1e-6)


def test_bfloat16_is_kept_as_such(pool2) -> None:
    changed = sections(4, XL)
    changed["training"]["mixed_precision_param"] = "bfloat16"
    assert pool2.run(kept_dtypes, changed) == [["torch.bfloat16"]] * 2


def kept_dtypes(changed: dict[str, Any]) -> list[str]:
    _, training = build_tiny(changed)
    whole = global_batch(0)
    share = slice(training.world.rank * 4, training.world.rank * 4 + 4)
    step(training, [MicroBatch(*(part[share] for part in whole))], 100, 0)
    kept = training.memory.of(whole.rows[share]).layers
    return sorted({str(tensor.dtype) for layer in kept for tensor in layer})


# ---- checkpoints

CONFIG = """
[model]
dim = 32
n_layers = 2
attention = { n_heads = 4, n_kv_heads = 2, masks = ["causal", "document"] }
ffn = { hidden = 48 }
memory = { type = "xl", length = 24, reset_on_bos = true, recompute_kv = RECOMPUTE }

[data]
source = { type = "files", path = "DOCUMENTS" }

[training]
local_batch_size = 2
global_batch_size = 8
seq_len = 16
mixed_precision_param = "float32"

[lr_scheduler]
warmup_steps = 2
total_steps = 8

[activation_checkpoint]
mode = "none"

[checkpoint]
enable = true
interval = 4

[metrics]
log_freq = 1
"""


@pytest.fixture(params=["false", "true"], ids=["keys", "inputs"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_config(tmp_path, CONFIG.replace("RECOMPUTE", request.param), longest=17)


def test_a_run_goes_on_with_its_memory(config: Path, tmp_path: Path, pool2) -> None:
    """In the same layout to the bit; in another one the rows go to the ranks that own them now."""
    assert go(config, tmp_path / "straight", "--training.steps=8") == 0
    assert go(config, tmp_path / "one", "--training.steps=4") == 0
    assert pool2.run(go, config, tmp_path / "two", "--training.steps=4") == [0, 0]
    expected = logged(tmp_path / "straight")
    for name, where in (("one", "alone"), ("one", "on two"), ("two", "on two"), ("two", "alone")):
        folder = tmp_path / f"{name} {where}"
        shutil.copytree(tmp_path / name, folder)
        sizes = ("--training.steps=8", "--training.local_batch_size=3")[: 2 if name == "two" else 1]
        if where == "alone":
            assert go(config, folder, *sizes) == 0
        else:
            assert pool2.run(go, config, folder, *sizes) == [0, 0]
        torch.testing.assert_close(logged(folder), expected, rtol=1e-5, atol=0)
    assert logged(tmp_path / "one alone") == expected


def test_where_the_data_begin_anew_nothing_is_remembered(config: Path, tmp_path: Path) -> None:
    assert go(config, tmp_path / "run", "--training.steps=4") == 0
    changed = ("--checkpoint.exclude_from_loading=dataloader", "--training.global_batch_size=4", "--training.steps=5")
    run = Trainer(load_job(config, [f"--job.dump_folder={tmp_path / 'run'}", *changed]), StopFlag())
    assert run.run() == 0
    state = run.training.memory.state(range(4))
    assert state["valid"].tolist() <= [16] * 4  # one segment


# ---- the claim


def recalled(memory: Any, n_texts: int = 100) -> list[float]:
    """Loss on a token that repeats the one 13 before it, text after text: two segments of 8, which have it apart.

    [one of 8 tokens, 11 fillers, a question, the token again, fillers].
    """
    changed = {"type": "none"} if memory is None else memory
    model = {"n_layers": 1, "memory": changed, "attention": {"n_heads": 2}, "ffn": {"hidden": 64}}
    settings = {"local_batch_size": 32, "seq_len": 8, "steps": 2 * n_texts, "mixed_precision_param": "float32"}
    schedule = {"warmup_steps": 20, "decay_type": "cosine"}
    _, training = build_tiny({"model": model, "training": settings, "lr_scheduler": schedule})
    generator = torch.Generator().manual_seed(0)
    losses = []
    for index in range(2 * n_texts):
        if index % 2 == 0:
            answers = torch.randint(8, (32,), generator=generator)
            text = torch.full((32, 16), 8)
            text[:, 0], text[:, 12], text[:, 13] = answers, 9, answers
        tokens = text[:, 8 * (index % 2) :][:, :8]
        targets = torch.full_like(tokens, -100)
        if index % 2:
            targets[:, 4] = answers
        batch = MicroBatch(tokens, targets, torch.zeros_like(tokens), torch.arange(32))
        losses.append(step(training, [batch], 32, index).loss.item())
    return losses[1::2]


@pytest.mark.parametrize("recompute_kv", [False, True])
def test_what_is_in_an_earlier_segment_is_learned_with_memory(recompute_kv: bool) -> None:
    assert max(recalled({"type": "xl", "length": 8, "recompute_kv": recompute_kv})[-10:]) < 0.05


def test_and_stays_at_chance_without() -> None:
    chance = math.log(8)
    losses = recalled(None)[-10:]
    assert min(losses) > chance - 0.1
    assert sum(losses) / len(losses) == pytest.approx(chance, abs=0.1)


# ---- refusals


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ({"embedding": {"position": {"type": "learned", "max_len": 64}}}, "type", "model.embedding.position.type"),
        ({"embedding": {"position": "sinusoidal"}}, "type", "model.embedding.position.type"),
        ({"stack": "recurrent"}, "type", "model.stack.type"),
        ({"attention": {"n_heads": 4, "kernel": "flash_attn"}}, "type", "model.attention.kernel.type"),
        (
            {"attention": {"n_heads": 4, "masks": ["causal", "document"]}},
            "reset_on_bos",
            r"model.attention.masks\[1\].type",
        ),
        (
            {"attention": {"n_heads": 4, "masks": ["causal", {"type": "sliding_window", "window": 20}]}},
            "length",
            r"model.attention.masks\[1\].window = 20",
        ),
        (
            {"layers": [{"at": 1, "attention": {"masks": ["causal", {"type": "sliding_window", "window": 8}]}}]},
            "length",
            r"model.layers\[0\].attention.masks\[1\].window = 8",
        ),
    ],
)
def test_what_does_not_go_with_it(model: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"dim": 32, "memory": XL} | model})
    reasons = [problem.why for problem in caught.value.problems if problem.key == f"model.memory.{key}"]
    assert len(reasons) == 1, caught.value
    assert re.search(words, reasons[0])


@pytest.mark.parametrize(
    "model",
    [
        {"attention": {"n_heads": 4, "masks": ["causal", {"type": "sliding_window", "window": 21}]}},
        {"memory": XL | {"reset_on_bos": True}, "attention": {"n_heads": 4, "masks": ["causal", "document"]}},
        {"stack": {"type": "shared", "n_unique": 2}},
    ],
)
def test_what_does(model: dict[str, Any]) -> None:
    assert job_from_dict({"model": {"dim": 32, "memory": XL} | model}).model.memory.type == "xl"


def test_a_scaling_must_reach_over_memory() -> None:
    yarn = {"type": "rope", "scaling": {"type": "yarn", "factor": 2.0, "original_max_len": 16}}
    model = {"dim": 32, "memory": XL, "attention": {"n_heads": 4, "position": yarn}}
    job_from_dict({"model": model, "training": {"seq_len": 12}})
    with pytest.raises(ConfigError, match=r"model\.memory has 20 more"):
        job_from_dict({"model": model, "training": {"seq_len": 13}})


def test_validation_that_shows_less_than_training_is_told() -> None:
    tables = {"model": {"memory": XL}, "training": {"seq_len": 16}}
    told = [job_from_dict(tables | {"validation": {"enable": True, "seq_len": n}}).warnings for n in (35, 36)]
    assert ["validation rows begin with an empty memory" in " ".join(lines) for lines in told] == [True, False]
