"""Dropout's masks: as random as they look, and the same for every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import DispatchedOps
from tests.models.tiny import VOCAB, tiny_model
from tests.runs import CPU, Run, train
from titan_lite.config.load import job_from_dict
from titan_lite.models.context import TrainingFacts
from titan_lite.models.dropout import Dropout, NoDropout, Noise, dropout, drops, no_noise
from titan_lite.run.signals import StopFlag
from titan_lite.trainer import Trainer

RTOL = 1e-5
"""fp32: losses of the same masks in another layout."""
SIGMAS = 5.0
"""Every statistic is of fixed bits: a bound that chance alone passes once in a million."""
DROPPING: dict[str, Any] = {
    "embedding": {"dropout": 0.2},
    "residual": {"dropout": 0.1},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "dropout": 0.1, "kernel": "eager"},
}


def noise(rows: list[int] | range, seed: int = 0, step: int = 0, layer: int | None = None) -> Noise:
    noise = Noise.of(seed, CPU, step, torch.tensor(list(rows)))
    return noise if layer is None else noise.layer(layer)


def bits(rows: list[int] | range, size: int, place: str = "a", **facts: Any) -> Tensor:
    """The high 4 bits of each element, 0..15."""
    made = dropout(0.1, place)
    assert isinstance(made, Dropout)
    return (made.bits(noise(rows, **facts), (size,)) >> 28) + 8


def surprise(counts: Tensor) -> float:
    """Chi-square of counts that should be even, in standard deviations."""
    expected = counts.sum().item() / counts.numel()
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / math.sqrt(2 * degrees)


def of_pairs(a: Tensor, b: Tensor) -> float:
    """Surprise of the 256 pairs of values: they are even only where a and b are, and do not depend on each other."""
    return surprise(torch.bincount((16 * a + b).flatten(), minlength=256).double())


def average(surprises: list[float]) -> float:
    """Of several looks, in standard deviations again."""
    return sum(surprises) / math.sqrt(len(surprises))


# ---- one mask


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_scale(p: float):
    rows, size = 16, 1 << 14
    x = torch.full((rows, size), 3.0)
    y = dropout(p, "a")(x, noise(range(rows)))
    dropped = (y == 0).double()
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 3.0) * (1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p))
    assert abs(dropped.mean().item() - p) < SIGMAS * deviation / math.sqrt(rows * size)
    # As even over rows, and over places in the row, as independent draws are.
    for axis, n in ((1, size), (0, rows)):
        spread = dropped.mean(axis).std().item() / (deviation / math.sqrt(n))
        assert abs(spread - 1) < SIGMAS / math.sqrt(2 * dropped.numel() / n)


def test_values_are_even_and_neighbours_independent():
    """Four million elements, three times: with plain counters in place of spread ones, lags of 3, 5 and 12 show."""
    values = [bits(range(16), 1 << 18, seed=seed) for seed in range(3)]
    assert average([surprise(torch.bincount(v.flatten(), minlength=16).double()) for v in values]) < SIGMAS
    for lag in (1, 2, 3, 5, 8, 12, 64, 768):
        assert average([of_pairs(v[:, :-lag], v[:, lag:]) for v in values]) < SIGMAS, lag


def test_rows_are_independent():
    values = bits(range(1 << 18), 2)
    for lag in (1, 2, 3, 4, 8, 16, 1024):
        assert of_pairs(values[:-lag], values[lag:]) < SIGMAS, lag


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"step": 0}, {"step": 1}),
        ({"layer": None}, {"layer": 0}),
        ({"layer": 0}, {"layer": 1}),
        ({"layer": 1, "step": 0}, {"layer": 0, "step": 1}),
        ({"place": "attention"}, {"place": "ffn"}),
    ],
)
def test_seeds_steps_layers_and_places_are_independent(one: dict[str, Any], other: dict[str, Any]):
    rows = range(16)
    assert of_pairs(bits(rows, 1 << 14, **one), bits(rows, 1 << 14, **other)) < SIGMAS


def test_steps_and_layers_are_even_at_one_element():
    """Over 2000 steps, and as many layers: values of the same few elements."""
    for fact in ("step", "layer"):
        values = torch.stack([bits([5], 4, **{fact: index})[0] for index in range(2000)])
        for element in range(4):
            assert surprise(torch.bincount(values[:, element], minlength=16).double()) < SIGMAS, (fact, element)
        assert of_pairs(values[:-1], values[1:]) < SIGMAS


def test_the_same_function_whatever_the_cut():
    made = dropout(0.3, "a")
    x = torch.randn(6, 4, 8)
    whole = made(x, noise(range(6)))
    for rows in ([3], [1, 5], [4, 0, 2]):
        assert torch.equal(made(x[rows], noise(rows)), whole[rows])


def test_gradient_is_the_mask():
    made = dropout(0.3, "a")
    x = torch.randn(4, 8, requires_grad=True)
    y = made(x, noise(range(4)))
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_masks_are_the_same(backend: str):
    made = dropout(0.3, "a")
    compiled = torch.compile(made, backend=backend, fullgraph=True)
    for index in range(3):
        x = torch.randn(4, 8, 16)
        here = noise(range(4 * index, 4 * index + 4), step=index, layer=index)
        assert torch.equal(compiled(x, here), made(x, here))


# ---- in a model


def test_off_is_no_operation():
    x = torch.randn(2, 3)
    assert isinstance(dropout(0.0, "a"), NoDropout)
    assert dropout(0.0, "a")(x, noise(range(2))) is x
    assert dropout(0.5, "a")(x, None) is x
    assert no_noise(0, torch.arange(2)) is None
    plain, dropping = tiny_model(), tiny_model(residual={"dropout": 0.1}, embedding={"dropout": 0.1})
    assert not drops(plain)
    assert drops(dropping)
    counts = []
    for model in (plain, dropping):
        counter = DispatchedOps()
        counter.start()
        model(torch.zeros(2, 8, dtype=torch.int64))
        counts.append(counter.stop())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("place", ["embedding", "residual", "attention"])
def test_every_place_drops_in_training_only(place: str):
    model = tiny_model(**{place: DROPPING[place]})
    tokens = torch.randint(VOCAB, (4, 16))
    draws = [model(tokens, facts=TrainingFacts(noise(range(4), step=index))) for index in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2], atol=1e-4)
    assert not torch.allclose(draws[0], model(tokens), atol=1e-4)
    assert torch.equal(model(tokens), model(tokens))


def sections(local_batch_size: int, **more: dict[str, Any]) -> dict[str, Any]:
    return {"model": DROPPING, "training": {"local_batch_size": local_batch_size, "global_batch_size": 8}} | more


@pytest.fixture(scope="module")
def serial() -> Run:
    return train(sections(8), 3)


def test_rerun_is_bitwise_the_same(serial: Run):
    assert train(sections(8), 3).losses == serial.losses
    assert train({"training": {"local_batch_size": 8}}, 3).losses != serial.losses


@pytest.mark.parametrize("local_batch_size", [4, 3, 1])
def test_micro_batches_change_nothing(serial: Run, local_batch_size: int):
    torch.testing.assert_close(train(sections(local_batch_size), 3).losses, serial.losses, rtol=RTOL, atol=0)


def test_ranks_change_nothing(serial: Run, pool2):
    for run in pool2.run(train, sections(2), 3):
        torch.testing.assert_close(run.losses, serial.losses, rtol=RTOL, atol=0)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_masks_are_the_same(serial: Run, mode: str):
    run = train(sections(8, activation_checkpoint={"mode": mode, "selective_ac_option": "op"}), 3)
    assert run.losses == serial.losses
    assert all(torch.equal(run.weights[name], weight) for name, weight in serial.weights.items())


def test_compiled_and_recomputed_equals_eager(serial: Run):
    compiled = {"compile": {"enable": True, "backend": "aot_eager"}, "activation_checkpoint": {"mode": "full"}}
    torch.testing.assert_close(train(sections(8, **compiled), 3).losses, serial.losses, rtol=RTOL, atol=0)


def test_compiled_equals_eager_and_is_compiled_once(serial: Run):
    """What changes from step to step and from layer to layer are values of tensors, not constants of a graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = train(sections(8, compile={"enable": True, "backend": "aot_eager"}), 3)
    torch.testing.assert_close(run.losses, serial.losses, rtol=RTOL, atol=0)
    # One more where the first layer's input is not like the others'.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# ---- in a run


def run(text: str, folder: str, steps: int, local_batch_size: int) -> int:
    """A trainer's run in this process, or as one rank of a pool."""
    tables = {
        "model": {"dim": 32, "n_layers": 2, "ffn": {"hidden": 48}} | DROPPING,
        "job": {"dump_folder": folder},
        "data": {"source": {"type": "files", "path": text}},
        "training": {
            "local_batch_size": local_batch_size,
            "global_batch_size": 8,
            "seq_len": 16,
            "steps": steps,
            "mixed_precision_param": "float32",
        },
        "lr_scheduler": {"warmup_steps": 0, "total_steps": 4},
        "checkpoint": {"enable": True, "interval": 2, "async_mode": "disabled"},
        "metrics": {"log_freq": 1},
    }
    return Trainer(job_from_dict(tables), StopFlag()).run()


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_run_may_go_on_with_other_ranks(tmp_path: Path, pool2):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(500)))
    one, other = tmp_path / "one", tmp_path / "other"
    assert run(str(text), str(one), 4, 3) == 0
    assert pool2.run(run, str(text), str(other), 2, 4) == [0, 0]
    assert run(str(text), str(other), 4, 1) == 0
    losses = logged(one, "loss")
    assert len(losses) == 4
    torch.testing.assert_close(logged(other, "loss"), losses, rtol=RTOL, atol=0)
