"""Long-term memory in training: it belongs to rows, its statistics to the model, whatever the layout."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.memory.test_lanes_training import LONG, STEPS, go, logged, sections, write_config
from tests.runs import build_tiny, global_batch, train
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.data.batch import IGNORE
from titan_lite.models.memory.whitening import Whitening
from titan_lite.parallel.fsdp import evaluating
from titan_lite.step import MicroBatch, step


def test_it_differs_from_xl_as_soon_as_there_is_something_to_look_up() -> None:
    serial = train(sections(8, LONG), STEPS)
    near = train(sections(8, {"type": "xl", "length": 8}), STEPS)
    none = train(sections(8, LONG | {"retrieve": 0}), STEPS)
    assert none.losses == near.losses
    assert none.norms == near.norms
    assert serial.losses[0] == pytest.approx(near.losses[0], rel=1e-6)
    assert serial.losses[1] != pytest.approx(near.losses[1], rel=1e-6)  # one segment of 16 tokens is more than 8


def statistics(changed: dict[str, Any]) -> list[list[float]]:
    """The buffers after some steps, of this rank."""
    _, training = build_tiny(changed)
    size = 8 // training.world.size
    for index in range(3):
        whole = global_batch(index)
        share = slice(training.world.rank * size, training.world.rank * size + size)
        step(training, [MicroBatch(*(part[share] for part in whole))], 100, index)
    return [buffer.flatten().tolist() for buffer in training.model.summaries.buffers()]


def test_statistics_are_those_of_all_ranks(pool2) -> None:
    alone = statistics(sections(8, LONG))
    for of_rank in pool2.run(statistics, sections(4, LONG)):
        for ours, theirs in zip(of_rank, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert alone[2] == [pytest.approx(32 * (1 + 0.99 + 0.99**2))]  # 8 rows of 4 segments a step


# ---- validation and sampling


def test_validation_reads_as_training_does() -> None:
    """A row in one piece, or in three that go on, which nothing is counted of: the losses of a stream."""
    _, training = build_tiny(sections(8, LONG))
    whitening = training.model.summaries
    assert isinstance(whitening, Whitening)
    for index in range(3):
        step(training, [global_batch(index)], 100, index)
    rows = global_batch(9, rows=3, seq_len=44)
    before = [buffer.clone() for buffer in whitening.buffers()]
    with evaluating(training.model):
        pieces = []
        for piece in training.reading(*rows[:3]):
            pieces.append(piece)
            assert piece.memory is not None
            training.validation_objective(training.model, *piece[:3], memory=piece.memory)
    assert [piece.tokens.shape[1] for piece in pieces] == [16, 16, 12]
    # The row's second document begins at token 22: in the second piece, and before the third.
    assert [piece.documents[0].tolist() for piece in pieces] == [[0] * 16, [0] * 6 + [1] * 10, [0] * 12]
    assert torch.equal(torch.cat([piece.tokens for piece in pieces], dim=1), rows.tokens)
    whitening.after_step(lambda tensor: tensor)
    for old, new in zip(before, whitening.buffers(), strict=True):
        assert torch.equal(old, new)


# ---- checkpoints

CONFIG = """
[model]
dim = 32
n_layers = 2
attention = { n_heads = 4, n_kv_heads = 2, masks = ["causal", "document"] }
ffn = { hidden = 48 }

[model.memory]
type = "long_term"
length = 16
segment = 4
segments = 8
retrieve = 2
reset_on_bos = true
recompute_kv = RECOMPUTE

[data]
source = { type = "files", path = "DOCUMENTS" }
held_out = 0.2

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

[validation]
enable = true
freq = 4
steps = 2
local_batch_size = 2
seq_len = 40

[generation]
prompts = ["document 7 abc def"]
max_new_tokens = 20

[checkpoint]
enable = true
interval = 4

[metrics]
log_freq = 1
"""


@pytest.fixture(params=["false", "true"], ids=["keys", "inputs"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_config(tmp_path, CONFIG.replace("RECOMPUTE", request.param), longest=31)


def test_a_run_goes_on_with_its_memory(config: Path, tmp_path: Path, pool2) -> None:
    """In the same layout to the bit, validation and samples included; in another one, rows go to their new ranks."""
    assert go(config, tmp_path / "straight", "--training.steps=8") == 0
    assert go(config, tmp_path / "one", "--training.steps=4") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert go(config, tmp_path / "one", "--training.steps=8") == 0
    assert pool2.run(go, config, tmp_path / "two", "--training.steps=8", "--training.local_batch_size=3") == [0, 0]
    expected = logged(tmp_path / "straight"), logged(tmp_path / "straight", "validation_loss")
    assert (logged(tmp_path / "one"), logged(tmp_path / "one", "validation_loss")) == expected
    torch.testing.assert_close(logged(tmp_path / "two"), expected[0], rtol=1e-5, atol=0)


# ---- the claim


ROWS, PARTS, ANSWERS = 48, 6, 4


def recalled(memory: dict[str, Any], steps: int) -> list[float]:
    """Loss on a token that repeats one 40 before it, with four segments of 8 between question and answer.

    A text: [one of 4 answers, a name], three segments of fillers, [the name], [question, the answer again, fillers].
    What stands before the question is like what stands around the answer, and nothing else is. Rows are at different
    places of their texts.
    """
    model = {"n_layers": 1, "memory": memory, "attention": {"n_heads": 2}, "ffn": {"hidden": 64}}
    settings = {"local_batch_size": ROWS, "seq_len": 8, "steps": steps, "mixed_precision_param": "float32"}
    schedule = {"warmup_steps": 20, "decay_type": "cosine"}
    _, training = build_tiny(
        {"model": model, "training": settings, "lr_scheduler": schedule, "optimizer": {"lr": 3e-3}}
    )
    generator = torch.Generator().manual_seed(0)
    answers = names = torch.zeros(ROWS, dtype=torch.int64)
    found = []
    for index in range(steps):
        part = (index + torch.arange(ROWS)) % PARTS
        answers = torch.where(part == 0, torch.randint(ANSWERS, (ROWS,), generator=generator), answers)
        names = torch.where(part == 0, torch.randint(10, 14, (ROWS,), generator=generator), names)
        named = (part == 0) | (part == PARTS - 2)
        tokens = torch.where(named, names, 8)[:, None].repeat(1, 8)
        tokens[:, 0] = torch.where(part == 0, answers, torch.where(part == PARTS - 1, 9, tokens[:, 0]))
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 0] = torch.where(part == PARTS - 1, answers, IGNORE)
        batch = MicroBatch(tokens, targets, torch.zeros_like(tokens), torch.arange(ROWS))
        found.append(step(training, [batch], ROWS // PARTS, index).loss.item())
    return found


def test_what_is_beyond_the_short_memory_is_learned() -> None:
    memory = {"type": "long_term", "length": 8, "segment": 8, "segments": 4, "retrieve": 1}
    assert max(recalled(memory, 300)[-20:]) < 0.2


def test_and_is_not_with_the_short_one_alone() -> None:
    chance = math.log(ANSWERS)
    last = recalled({"type": "xl", "length": 8}, 150)[-20:]
    assert min(last) > chance - 0.2
    assert sum(last) / len(last) == pytest.approx(chance, abs=0.1)


# ---- refusals


@pytest.mark.parametrize(
    ("tables", "key", "words"),
    [
        ({"model": {"memory": {"length": 10}}}, "segment", r"model\.memory\.length = 10"),
        ({"training": {"seq_len": 18}}, "segment", r"training\.seq_len = 18"),
        ({"validation": {"enable": True, "seq_len": 18}}, "segment", r"validation\.seq_len = 18"),
        ({"model": {"memory": {"retrieve": 7}}}, "retrieve", r"model\.memory\.segments = 6"),
        (
            {"model": {"attention": {"masks": ["causal", {"type": "sliding_window", "window": 40}]}}},
            "type",
            r"model\.attention\.masks\[1\]\.window = 40",
        ),
        ({"model": {"attention": {"kernel": "flash_attn"}}}, "type", r"model\.attention\.kernel\.type"),
        ({"model": {"attention": {"masks": ["causal", "document"]}}}, "reset_on_bos", r"model\.attention\.masks\[1\]"),
        ({"model": {"stack": "recurrent"}}, "type", r"model\.stack\.type"),
        ({"model": {"embedding": {"position": "sinusoidal"}}}, "type", r"model\.embedding\.position\.type"),
    ],
)
def test_what_does_not_go_with_it(tables: dict[str, Any], key: str, words: str) -> None:
    model = {"dim": 32, **tables.get("model", {})}
    model["memory"] = LONG | model.get("memory", {})
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"training": {"seq_len": 16}} | tables | {"model": model})
    reasons = [problem.why for problem in caught.value.problems if problem.key == f"model.memory.{key}"]
    assert len(reasons) == 1, caught.value
    assert re.search(words, reasons[0])
