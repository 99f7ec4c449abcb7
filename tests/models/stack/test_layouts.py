"""Models whose blocks run several times train alike in every layout: sharded, checkpointed, compiled, accumulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.runs import Run, build_tiny, global_batch, train
from titan_lite.models.flops import training_flops_per_token
from titan_lite.step import step

RTOL = 1e-5
"""fp32: losses and gradient norms."""
WEIGHT_ATOL = 2e-4
"""fp32: weights after Adam at lr 1e-2, which turns rounding of tiny gradients into steps of that size."""
STEPS = 3
LAYOUT = {"training": {"local_batch_size": 8, "global_batch_size": 8}}
STACKS: dict[str, dict[str, Any]] = {
    "blocks": {"n_layers": 5, "stack": {"type": "shared", "share": "cycle_rev", "n_unique": 2}},
    "branches": {
        "n_layers": 4,
        "residual": {"type": "pre", "scale": {"type": "rezero", "init": 0.5}},
        "stack": {"type": "scheduled", "schedule": [0, 1, 1, 0], "scope": "branches"},
    },
    "recurrent": {
        "n_layers": 4,
        "residual": {"type": "sandwich_sum", "dropout": 0.1},
        "stack": {"type": "recurrent", "mean_iterations": 3, "backprop_iterations": 2},
    },
}
TIED = {"head": {"tied": True}}
COMPILED = {"enable": True, "backend": "aot_eager", "components": ["model"]}


@pytest.fixture(scope="module")
def serial() -> dict[str, Run]:
    return {name: train({"model": model} | LAYOUT, STEPS) for name, model in STACKS.items()}


def sections(name: str, local_batch_size: int, **more: Any) -> dict[str, Any]:
    return {"model": STACKS[name], "training": LAYOUT["training"] | {"local_batch_size": local_batch_size}} | more


def assert_equal_runs(run: Run, reference: Run) -> None:
    torch.testing.assert_close(run.losses, reference.losses, rtol=RTOL, atol=0)
    torch.testing.assert_close(run.norms, reference.norms, rtol=RTOL * 10, atol=0)
    assert run.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=WEIGHT_ATOL, msg=name)


@pytest.mark.parametrize("name", STACKS)
def test_accumulation_and_checkpointing_equal_one_batch(serial: dict[str, Run], name: str):
    """In one micro-batch checkpointing changes no bit; in several, only the order of sums."""
    checkpointed = train(sections(name, 8, activation_checkpoint={"mode": "full"}), STEPS)
    assert checkpointed.losses == serial[name].losses
    assert all(torch.equal(checkpointed.weights[key], weight) for key, weight in serial[name].weights.items())
    per_op = {"mode": "selective", "selective_ac_option": "op"}
    assert_equal_runs(train(sections(name, 2, activation_checkpoint=per_op), STEPS), serial[name])


@pytest.mark.parametrize("name", STACKS)
def test_compiled_equals_eager(serial: dict[str, Run], name: str):
    mode = {"mode": "full"}
    assert_equal_runs(train(sections(name, 8, compile=COMPILED, activation_checkpoint=mode), STEPS), serial[name])


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"parallelism": {"fsdp_reshard_after_forward": "always"}, "activation_checkpoint": {"mode": "full"}},
        {"compile": COMPILED, "activation_checkpoint": {"mode": "full"}},
    ],
    ids=["default", "always resharded, checkpointed", "compiled, checkpointed"],
)
def test_fsdp_equals_one_process(serial: dict[str, Run], pool2, name: str, more: dict[str, Any]):
    """Both ranks iterate as often as one process: they would wait for each other for ever if not."""
    for run in pool2.run(train, sections(name, 2, **more), STEPS):
        assert_equal_runs(run, serial[name])


def sharded_units(model: dict[str, Any]) -> dict[str, bool]:
    """{unit: whether it is sharded again after its forward} of a model under FSDP's default."""
    from torch.distributed.fsdp import FSDPModule

    _, training = build_tiny({"model": model, "training": {"local_batch_size": 4}})
    units = {name: part for name, part in training.model.named_modules() if isinstance(part, FSDPModule) and name}
    return {name: part._get_fsdp_state()._fsdp_param_group._reshard_after_forward for name, part in units.items()}


def test_what_runs_several_times_stays_gathered(pool2):
    found = pool2.run(sharded_units, STACKS["recurrent"] | TIED)[0]
    blocks = {"stack.blocks.0": True, "stack.blocks.1": False, "stack.blocks.2": False, "stack.blocks.3": False}
    assert found == blocks | {"stack.adapter": False}
    found = pool2.run(sharded_units, STACKS["branches"])[0]
    branches = {f"stack.shared.{branch}.{i}" for branch in ("attention", "ffn") for i in range(2)}
    assert {name for name, again in found.items() if not again} == branches | {"head"}
    assert {name for name, again in found.items() if again} == {f"stack.blocks.{i}" for i in range(4)} | {"embedding"}


def test_steps_iterate_differently_and_a_restart_alike(serial: dict[str, Run]):
    _, training = build_tiny(sections("recurrent", 8))
    drawn = [training.iterations(step) for step in range(20)]
    assert len(set(drawn)) > 3
    assert drawn == [build_tiny(sections("recurrent", 8))[1].iterations(step) for step in range(20)]


def test_a_step_says_what_it_has_computed():
    _, training = build_tiny(sections("recurrent", 8))
    found = [step(training, [global_batch(index)], 100.0, index).work for index in range(4)]
    expected = training_flops_per_token(training.model, training.specs, 16)
    for index, work in enumerate(found):
        executed = training_flops_per_token(training.model, training.specs, 16, training.iterations(index))
        assert work == executed / expected
    assert len(set(found)) > 1
    _, plain = build_tiny(LAYOUT)
    assert step(plain, [global_batch(0)], 100.0, 0).work == 1


@pytest.mark.parametrize(("name", "graphs"), [("blocks", 1), ("branches", 1), ("recurrent", 2)])
def test_blocks_share_graphs(name: str, graphs: int):
    """One, and one more for iterations without gradients; whatever their number in a step."""
    _, training = build_tiny(sections(name, 8, compile=COMPILED | {"backend": "eager"}))
    torch._dynamo.reset()
    counters.clear()
    for index in range(4):
        step(training, [global_batch(index)], 100.0, index)
    assert counters["stats"]["unique_graphs"] == graphs
