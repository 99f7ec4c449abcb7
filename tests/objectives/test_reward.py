"""Rewards of pairs: optima in closed form, a rule that is learned, and every layout like one process."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.parallel.twins import split
from tests.runs import VOCAB, build_tiny, full
from titan_lite.config.check import notices
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.module import collect_metrics
from titan_lite.objectives.reward import LOSSES
from titan_lite.run.signals import StopFlag
from titan_lite.step import MicroBatch, Training, step
from titan_lite.trainer import Trainer

RTOL = 1e-5
"""fp32: losses and gradient norms of three steps."""
WEIGHT_ATOL = 2e-4
"""fp32: weights after three steps of Adam at lr 1e-2, which turns rounding of tiny gradients into such steps."""
METRIC_ATOL = 1e-5
"""fp32: means of rewards of about 1."""
STEPS = 3
PAIRS = str(Path(__file__).with_name("pairs.jsonl"))
"""For the check of configs: most rows are made here."""
T = 16


def best(name: str, smoothing: float) -> Tensor:
    """The two rewards at which a loss is least, found by LBFGS."""
    rewards = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = LOSSES[name](rewards[:1], rewards[1:], smoothing).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return rewards.detach()


def test_the_loss_is_least_where_the_paper_says() -> None:
    """arXiv 2405.20053: separable at +-ln((1 - e) / e) for each reward, contrastive at that margin."""
    chosen, rejected = best("separable", 0.1).tolist()
    assert (chosen, rejected) == (pytest.approx(2.19722, abs=1e-4), pytest.approx(-2.19722, abs=1e-4))
    chosen, rejected = best("contrastive", 0.05).tolist()
    assert chosen - rejected == pytest.approx(2.94444, abs=1e-4)


def test_without_smoothing_the_contrastive_loss_is_bradley_terry() -> None:
    chosen, rejected = torch.randn(2, 50).double()
    expected = -torch.log(chosen.exp() / (chosen.exp() + rejected.exp()))
    torch.testing.assert_close(LOSSES["contrastive"](chosen, rejected, 0.0), expected)


def rows(index: int, n_pairs: int = 4) -> MicroBatch:
    """Pairs of texts of several lengths, laid out as the data side does it; targets are part of the better ones."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(VOCAB, (2 * n_pairs, T + 1), generator=generator)
    targets, documents = torch.full((2 * n_pairs, T), -100), torch.ones(2 * n_pairs, T, dtype=torch.int32)
    for row in range(2 * n_pairs):
        length = 5 + (3 * row + index) % 11
        documents[row, :length] = 0
        if row % 2 == 0:
            targets[row, 2 : length - 1] = tokens[row, 3:length]
    return MicroBatch(tokens[:, :-1], targets, documents, torch.arange(2 * n_pairs))


def sections(reward: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "model": {"init": {"type": "normal", "std": 0.1}, "head": {"reward": "linear"}} | (model or {}),
        "objective": {"type": "reward"} | (reward or {}),
        "data": {"source": {"type": "pairs", "path": PAIRS}},
        "training": {"local_batch_size": 8, "global_batch_size": 8},
    } | more


def run(
    tables: dict[str, Any], make: Callable[[int], MicroBatch] = rows
) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, float]]:
    """Losses, norms, all parameters, and the metrics of the last step."""
    job, training = build_tiny(tables)
    world, losses, norms = training.world, [], []
    for index in range(STEPS):
        whole = make(index)
        share = len(whole.tokens) // world.dp_size
        mine = [part[world.dp_rank * share : (world.dp_rank + 1) * share] for part in whole]
        layout = job.parallelism
        piped = layout.pipeline_parallel_degree > 1
        size = layout.pipeline_parallel_microbatch_size if piped else job.training.local_batch_size
        tensors = step(training, split(MicroBatch(*mine), size), (whole.targets != -100).sum().item(), index)
        losses.append(tensors.loss.item())
        norms.append(tensors.grad_norm.item())
    metrics = world.merged(collect_metrics(training.model, world.total_of_layers))
    weights = {name: full(parameter) for name, parameter in training.model.named_parameters()}
    return losses, norms, weights, {name: value.item() for name, value in metrics.items()}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=RTOL, atol=0)
    torch.testing.assert_close(one[1], other[1], rtol=10 * RTOL, atol=0)
    for name, weight in one[2].items():
        torch.testing.assert_close(weight, other[2][name], rtol=0, atol=WEIGHT_ATOL, msg=name)
    assert one[3] == pytest.approx(other[3], rel=0, abs=METRIC_ATOL)


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return {name: run(sections(**OBJECTIVES[name])) for name in OBJECTIVES}


OBJECTIVES: dict[str, dict[str, Any]] = {
    "rewards alone": {},
    "with next tokens": {
        "reward": {"lm_weight": 0.5},
        "model": {"head": {"tied": True, "reward": {"type": "linear", "bias": True}}},
    },
    "experts": {
        "reward": {"loss": "contrastive"},
        "model": {"ffn": {"type": "moe", "experts": {"hidden": 16}, "balance": ["sequence"]}},
    },
    "tied": {"model": {"head": {"tied": True, "reward": "linear"}}},
    "narrow rows": {
        "reward": {"lm_weight": 1.0},
        "model": {"embedding": {"type": "low_rank", "width": 24}, "head": {"tied": True, "reward": "linear"}},
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_equals_one_batch(serial: dict[str, Any], name: str) -> None:
    changed = OBJECTIVES[name] | {"training": {"local_batch_size": 2, "global_batch_size": 8}}
    assert_same(run(sections(**changed)), serial[name])


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("rewards alone", {"training": {"local_batch_size": 4, "global_batch_size": 8}}),
    "fsdp, tied": ("with next tokens", {"training": {"local_batch_size": 2, "global_batch_size": 8}}),
    "replicas": (
        "rewards alone",
        {
            "training": {"local_batch_size": 4, "global_batch_size": 8},
            "parallelism": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
        },
    ),
    "tensor": ("rewards alone", {"parallelism": {"tensor_parallel_degree": 2}}),
    "tensor, tied": ("with next tokens", {"parallelism": {"tensor_parallel_degree": 2}}),
    "tensor, narrow rows": ("narrow rows", {"parallelism": {"tensor_parallel_degree": 2}}),
    "pipeline, whose last stage has a table that nothing trains there": (
        "tied",
        {"parallelism": {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 4}},
    ),
    "experts": (
        "experts",
        {"training": {"local_batch_size": 4, "global_batch_size": 8}, "parallelism": {"expert_parallel_degree": 2}},
    ),
    "tensor, compiled and recomputed": (
        "rewards alone",
        {
            "parallelism": {"tensor_parallel_degree": 2},
            "compile": {"enable": True, "backend": "aot_eager"},
            "activation_checkpoint": {"mode": "full"},
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(serial: dict[str, Any], pool2: Any, layout: str) -> None:
    name, changes = LAYOUTS[layout]
    for of_rank in pool2.run(run, sections(**OBJECTIVES[name] | changes)):
        assert_same(of_rank, serial[name])


def test_all_that_takes_part_learns(serial: dict[str, Any]) -> None:
    """The output matrix does only where next tokens count."""
    for name, frozen in (("rewards alone", {"head.output.weight"}), ("with next tokens", set[str]())):
        _, training = build_tiny(sections(**OBJECTIVES[name]))
        still = {n for n, p in training.model.named_parameters() if torch.equal(full(p), serial[name][2][n])}
        assert still == frozen


def test_without_next_tokens_targets_do_not_matter(serial: dict[str, Any]) -> None:
    """Nor for the losses that experts add, which are of all tokens."""

    def few(index: int) -> MicroBatch:
        whole = rows(index)
        targets = torch.full_like(whole.targets, -100)
        targets[0, 2] = whole.targets[0, 2]
        return whole._replace(targets=targets)

    assert_same(run(sections(**OBJECTIVES["experts"]), few), serial["experts"])


def test_work_is_that_of_all_that_is_read_and_of_the_logits_that_are_made() -> None:
    """Next tokens cost 3 products with the output matrix for each token of the better texts, and nothing else."""
    whole, flops, expected = rows(0), [], []
    for weight in (0.0, 0.5):
        job, training = build_tiny(sections(reward={"lm_weight": weight}))
        with FlopCounterMode(display=False) as counter:
            step(training, [whole], 1.0, 0)
        flops.append(counter.get_total_flops() / whole.tokens.numel())
        share = job.objective.logits_per_token
        expected.append(training_flops_per_token(training.model, training.specs, T, logits=share))
        lengths = [5 + 3 * row % 11 for row in range(8)]
        assert training.objective.n_read(whole.targets, whole.documents) == sum(lengths)
    assert flops[1] - flops[0] == expected[1] - expected[0] > 0


def test_the_logits_are_those_of_a_model_without_it() -> None:
    def logits(training: Training) -> Tensor:
        return training.model(rows(0).tokens)

    _, with_head = build_tiny(sections())
    _, without = build_tiny({"model": {"init": {"type": "normal", "std": 0.1}}})
    assert torch.equal(logits(with_head), logits(without))


@pytest.mark.parametrize("lm_weight", [0.0, 0.5])
def test_the_loss_is_a_mean_over_pairs_and_one_over_the_better_answers(lm_weight: float) -> None:
    """Written out from states and logits, whatever the targets are as many as."""
    _, training = build_tiny(sections(reward={"lm_weight": lm_weight}))
    whole, head = rows(0), training.model.head
    ends = (whole.documents == 0).sum(1) - 1
    with torch.no_grad():
        states: Tensor = training.model(whole.tokens, whole.documents, consume=lambda x, output: x)
        logits: Tensor = training.model(whole.tokens, whole.documents)
        rewards = [float(states[i, end] @ head.reward.weight[0]) for i, end in enumerate(ends)]
    signs = [reward if i % 2 == 0 else -reward for i, reward in enumerate(rewards)]
    each = [0.9 * math.log1p(math.exp(-r)) + 0.1 * math.log1p(math.exp(r)) for r in signs]
    nats = [
        -float(logits[i, t].log_softmax(-1)[whole.targets[i, t]])
        for i in range(0, len(ends), 2)
        for t in range(T)
        if whole.targets[i, t] != -100
    ]
    expected = sum(each) / (len(ends) / 2) + lm_weight * sum(nats) / len(nats)
    found = step(training, [whole], float(len(nats)), 0).loss.item()
    assert found == pytest.approx(expected, rel=RTOL)


def test_metrics_are_means_over_the_pairs() -> None:
    _, training = build_tiny(sections())
    whole = rows(0)
    ends = (whole.documents == 0).sum(1) - 1
    with torch.no_grad():
        states: Tensor = training.model(whole.tokens, whole.documents, consume=lambda x, output: x)
    rewards = torch.stack([states[i, end] @ training.model.head.reward.weight[0] for i, end in enumerate(ends)])
    margins = rewards[::2] - rewards[1::2]
    step(training, [whole], 1.0, 0)
    found = {name: value.item() for name, value in collect_metrics(training.model, training.world.total_tensor).items()}
    expected = {"accuracy": (margins > 0).float(), "margin": margins, "chosen": rewards[::2], "rejected": rewards[1::2]}
    assert found == {f"head.reward.{name}": pytest.approx(v.mean().item(), rel=1e-5) for name, v in expected.items()}


def write_pairs(path: Path, n: int) -> None:
    """The better answer is the one with a z."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(draw.randint(1, 3)))

    with path.open("w") as file:
        for _ in range(n):
            better = words()
            at = draw.randint(0, len(better))
            pair = {"question": words(), "good": f"{better[:at]}z{better[at:]}", "bad": words()}
            file.write(json.dumps(pair) + "\n")


def test_a_rule_is_learned_and_found_in_pairs_never_seen(tmp_path: Path) -> None:
    """A whole run from a file: the loss comes down to the least there is where one label in ten is wrong."""
    write_pairs(tmp_path / "pairs.jsonl", 600)
    tables = {
        "job": {"dump_folder": str(tmp_path / "run")},
        "model": {"dim": 32, "n_layers": 2, "attention": {"n_heads": 4}, "head": {"reward": "linear"}},
        "objective": {"type": "reward"},
        "data": {
            "source": {
                "type": "pairs",
                "path": str(tmp_path / "pairs.jsonl"),
                "prompt_key": "question",
                "chosen_key": "good",
                "rejected_key": "bad",
            },
            "held_out": 0.1,
        },
        "training": {"local_batch_size": 32, "seq_len": 48, "steps": 40, "dataloader": {"num_workers": 0}},
        "validation": {"enable": True, "freq": 40, "local_batch_size": 32, "seq_len": 48},
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": {"warmup_steps": 5},
        "metrics": {"log_freq": 40},
        "checkpoint": {"enable": True, "interval": 20},
    }
    job = job_from_dict(tables)
    assert Trainer(job, StopFlag()).run() == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (line for line in lines if "validation_reward_accuracy" in line)
    assert before["validation_reward_accuracy"] < 0.9
    assert after["validation_reward_accuracy"] > 0.95
    least = -2 * (0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert least <= after["validation_reward_loss"] < least + 0.1
    (last,) = (line for line in lines if line["step"] == 40 and "loss" in line)
    assert last["head.reward.accuracy"] > 0.95
    whole = weights_at(tmp_path / "run", 40)
    again = job_from_dict(tables | {"checkpoint": {"enable": True, "interval": 20, "load_step": 20}})
    assert Trainer(again, StopFlag()).run() == 0
    resumed = weights_at(tmp_path / "run", 40)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def weights_at(run: Path, step: int) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, optimizer states too."""
    return {
        name: t
        for file in (run / "checkpoint" / f"step-{step}").glob("*.safetensors")
        for name, t in load_file(file).items()
    }


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no head": ({"model": {"head": {"reward": "none"}}}, "model.head.reward.type", "trains a reward head"),
    "odd rows": (
        {"training": {"local_batch_size": 3, "global_batch_size": 6}},
        "training.local_batch_size",
        "each two rows are the texts of a pair",
    ),
    "plain text": ({"data": {"source": "python_stdlib"}}, "data.source.type", "reads pairs of texts"),
    "a bias that cancels": (
        {
            "objective": {"type": "reward", "loss": "contrastive"},
            "model": {"head": {"reward": {"type": "linear", "bias": True}}},
        },
        "model.head.reward.bias",
        "the same to both texts",
    ),
    "ring": ({"parallelism": {"context_parallel_degree": 2}}, "parallelism.context_parallel_degree", "whole texts"),
    "memory": ({"model": {"memory": {"type": "xl", "length": 4}}}, "model.memory.type", "nothing comes before"),
    "further tokens": ({"model": {"mtp": "heads"}}, "model.mtp.type", "would not be trained"),
    "other validation": (
        {"validation": {"enable": True, "dataset": "c4"}},
        "validation.dataset",
        "held-out pairs of data.source",
    ),
    "one text twice": (
        {"data": {"source": {"type": "pairs", "path": PAIRS, "rejected_key": "chosen"}}},
        "data.source.rejected_key",
        "is chosen_key too",
    ),
    "no key": (
        {"data": {"source": {"type": "pairs", "path": PAIRS, "chosen_key": ""}}},
        "data.source.chosen_key",
        "names no key",
    ),
    "pairs without the objective": ({"objective": {"type": "lm"}}, "data.source.type", "reads plain text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    changes, key, why = REFUSED[name]
    model = {"head": {"reward": "linear"}} | changes.get("model", {})
    with pytest.raises(ConfigError) as caught:
        job_from_dict(sections() | changes | {"model": model})
    (found,) = (problem for problem in caught.value.problems if problem.key == key)
    assert why in found.why


def test_a_term_of_a_loss_that_is_not_minimised_is_told() -> None:
    def told(weight: float) -> list[str]:
        job = job_from_dict(sections(reward={"lm_weight": weight}, training={"z_loss": 1e-4}))
        return [line for line in notices(job, 1) if "z_loss" in line]

    assert told(0.5) == []
    (line,) = told(0.0)
    assert "training.z_loss = 0.0001 has no effect" in line
