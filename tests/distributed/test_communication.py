"""What a training step says to the other ranks is what theory asks for, call by call and byte by byte, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
from torch import nn

from benchmarks.collectives import Collective, Collectives
from tests.runs import VOCAB, build_tiny, global_batch
from titan_lite.step import MicroBatch, Training, step

D, H, G, F, LAYERS = 128, 8, 4, 384, 4
"""The debugmodel of the llama3 preset."""
DH = D // H
TABLE = VOCAB * D
BLOCK = D * DH * (H + 2 * G) + H * DH * D + 3 * D * F + 2 * D
TENSORS = 3 + LAYERS * 9
LLAMA = {
    "model": {
        "name": "llama3",
        "flavor": "debugmodel",
        "dim": D,
        "n_layers": LAYERS,
        "attention": {"n_heads": H, "n_kv_heads": G},
        "ffn": {"hidden": F},
    }
}


def micro_batches(training: Training, size: int, index: int) -> tuple[list[MicroBatch], float]:
    """This rank's share of a global batch, and how many targets all of it has."""
    world, whole = training.world, global_batch(index)
    share = len(whole.tokens) // world.dp_size
    mine = [part[world.dp_rank * share : (world.dp_rank + 1) * share] for part in whole]
    batches = [MicroBatch(*parts) for parts in zip(*(part.split(size) for part in mine), strict=True)]
    return batches, (whole.targets != -100).sum().item()


def second_step(sections: dict[str, Any], size: int) -> list[Collective]:
    """The collectives of a step in micro-batches of `size` rows; the first one sets up more than it needs."""
    training = build_tiny(sections)[1]
    step(training, *micro_batches(training, size, 0), 0)
    with Collectives() as collectives:
        step(training, *micro_batches(training, size, 1), 1)
    return collectives.calls


class Unit(NamedTuple):
    """What is gathered together."""

    parameters: int
    gathers: int
    """In forward and backward of a micro-batch."""


def llama_units(head_gathers: int = 1, block_gathers: int = 2) -> list[Unit]:
    """By default blocks are gathered for forward and for backward, the head once for both, the embedding for forward
    only: its backward needs no weights. The final norm is with the model itself.
    """
    return [Unit(TABLE, 1), *[Unit(BLOCK, block_gathers)] * LAYERS, Unit(TABLE, head_gathers), Unit(D, 1)]


def theory(units: list[Unit], micro_batches: int, ranks: int, replicas: int = 1, width: int = 4) -> Counter[Collective]:
    """Sharded over `ranks`, in `replicas` of that. `width` = bytes of a parameter in forward; gradients have 4.

    Gradients meet in the shards after each micro-batch and in the replicas once. Norm and loss: one float of each
    tensor's norm, and one of the loss.
    """
    calls: Counter[Collective] = Counter()
    for unit in units:
        if ranks > 1:
            calls[Collective("all_gather", width * unit.parameters, ranks)] += unit.gathers * micro_batches
            calls[Collective("reduce_scatter", 4 * unit.parameters, ranks)] += micro_batches
        if replicas > 1:
            calls[Collective("all_reduce", 4 * unit.parameters // ranks, replicas)] += 1
    calls[Collective("all_reduce", 4, ranks * replicas)] += 1
    return calls


def norms(tensors: int, ranks: int) -> Counter[Collective]:
    return Counter([Collective("all_reduce", 4 * tensors, ranks)])


def assert_theory(calls: list[Collective], expected: Counter[Collective]) -> None:
    found = Counter(calls)
    assert found == expected, f"too many: {found - expected}, missing: {expected - found}"


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize(
    ("reshard", "units"),
    [("default", llama_units()), ("always", llama_units(2)), ("never", llama_units(1, 1))],
    ids=["default", "always", "never"],
)
def test_fsdp(pool2, reshard: str, units: list[Unit], size: int):
    sections = LLAMA | {"parallelism": {"fsdp_reshard_after_forward": reshard}}
    for calls in pool2.run(second_step, sections, size):
        assert_theory(calls, theory(units, 4 // size, 2) + norms(TENSORS, 2))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputing_gathers_nothing_again(pool2, mode: str):
    checkpointing = {"activation_checkpoint": {"mode": mode, "selective_ac_option": "op"}}
    for calls in pool2.run(second_step, LLAMA | checkpointing, 2):
        assert_theory(calls, theory(llama_units(), 2, 2) + norms(TENSORS, 2))


def test_bfloat16_halves_what_is_gathered(pool2):
    training = {"local_batch_size": 4, "seq_len": 16, "loss_chunk_tokens": 0, "mixed_precision_param": "bfloat16"}
    for calls in pool2.run(second_step, LLAMA | {"training": training}, 4):
        assert_theory(calls, theory(llama_units(), 1, 2, width=2) + norms(TENSORS, 2))


@pytest.mark.parametrize("size", [4, 1])
def test_ddp(pool2, size: int):
    """Nothing is sharded: gradients are summed, once per step, and the norm is known to all."""
    sections = LLAMA | {"parallelism": {"data_parallel_replicate_degree": 2}}
    for calls in pool2.run(second_step, sections, size):
        assert_theory(calls, theory(llama_units(), 4 // size, 1, replicas=2))


@pytest.mark.parametrize("size", [2, 1])
def test_hsdp(pool4, size: int):
    sections = LLAMA | {"parallelism": {"data_parallel_replicate_degree": 2}}
    for calls in pool4.run(second_step, sections, size):
        assert_theory(calls, theory(llama_units(), 2 // size, 2, replicas=2) + norms(TENSORS, 2))


DIM = 32
SMALL = VOCAB * DIM
SHARED = {"dim": DIM, "n_layers": 6, "stack": {"type": "shared", "share": "cycle", "n_unique": 2}}
RECURRENT = {
    "dim": DIM,
    "n_layers": 4,
    "stack": {"type": "recurrent", "mean_iterations": 5, "backprop_iterations": 2, "sampling": {"type": "fixed"}},
    "residual": {"type": "pre"},
}
SMALL_BLOCK = DIM * 8 * (4 + 2 * 2) + DIM * DIM + 3 * DIM * 48 + 2 * DIM


@pytest.mark.parametrize(
    ("reshard", "gathers", "head"), [("default", 1, 1), ("never", 1, 1), ("always", 6, 2)], ids=lambda value: str(value)
)
def test_a_shared_block_is_gathered_once_unless_always_resharded(pool2, reshard: str, gathers: int, head: int):
    """Three executions each: gathered for all of them, or for each of them forward and backward."""
    units = [Unit(SMALL, 1), *[Unit(SMALL_BLOCK, gathers)] * 2, Unit(SMALL, head), Unit(DIM, 1)]
    sections = {"model": SHARED, "parallelism": {"fsdp_reshard_after_forward": reshard}}
    for calls in pool2.run(second_step, sections, 2):
        assert_theory(calls, theory(units, 2, 2) + norms(3 + 2 * 9, 2))


@pytest.mark.parametrize(
    ("reshard", "core", "outer", "head"), [("default", 1, 2, 1), ("always", 5 + 2, 2, 2)], ids=["default", "always"]
)
def test_a_recurrent_core_is_gathered_once_unless_always_resharded(
    pool2, reshard: str, core: int, outer: int, head: int
):
    """Five iterations, two of which have gradients. Adapter and core iterate; prelude and coda have a block each."""
    blocks = [Unit(SMALL_BLOCK, outer), Unit(2 * DIM * DIM, core), *[Unit(SMALL_BLOCK, core)] * 2]
    units = [Unit(SMALL, 1), *blocks, Unit(SMALL_BLOCK, outer), Unit(SMALL, head), Unit(DIM, 1)]
    sections = {"model": RECURRENT, "parallelism": {"fsdp_reshard_after_forward": reshard}}
    for calls in pool2.run(second_step, sections, 4):
        assert_theory(calls, theory(units, 1, 2) + norms(4 + 4 * 9, 2))


def gathers_and_runs(sections: dict[str, Any]) -> list[str]:
    """Of a forward and a backward: "gather N" where unit N is asked for, "run N" where its forward begins."""
    training = build_tiny(sections)[1]
    units = list(training.model.shard_units())
    names = {4 * sum(parameter.numel() for parameter in unit.parameters()): i for i, unit in enumerate(units)}
    assert len(names) == len(units), "units are told apart by their size"
    batches, tokens = micro_batches(training, 4, 0)
    step(training, batches, tokens, 0)
    with Collectives() as collectives:
        for number, unit in enumerate(units):
            unit.register_forward_pre_hook(partial(_note, collectives, number))
        step(training, batches, tokens, 1)
    return list(_events(collectives.calls, names))


def _note(collectives: Collectives, number: int, module: nn.Module, args: Any) -> None:
    collectives.calls.append(Collective("run", number, 0))


def _events(calls: list[Collective], names: dict[int, int]) -> Iterator[str]:
    for call in calls:
        if call.kind == "run":
            yield f"run {call.bytes}"
        elif call.bytes in names and call.kind != "all_reduce":
            yield f"{'gather' if call.kind == 'all_gather' else 'reduce'} {names[call.bytes]}"


WIDE = [{"at": "1", "ffn": {"hidden": 64}}, {"at": "2", "ffn": {"hidden": 80}}, {"at": "3", "ffn": {"hidden": 96}}]
UNEQUAL: dict[str, Any] = {"dim": 40, "head": {"bias": True}}


def test_each_unit_is_gathered_before_the_one_in_front_of_it_computes(pool2):
    model = UNEQUAL | {"n_layers": 3, "layers": WIDE[:2]}
    forward = "gather 0 gather 1 run 0 gather 2 run 1 gather 3 run 2 gather 4 run 3 run 4"
    backward = "gather 3 reduce 4 gather 2 reduce 3 gather 1 reduce 2 reduce 1 reduce 0"
    for events in pool2.run(gathers_and_runs, {"model": model}):
        assert " ".join(events) == f"{forward} {backward}"


def test_gathers_follow_the_schedule_of_a_recurrent_stack(pool2):
    """Units 1 = prelude, 2 = adapter, 3 and 4 = core, 5 = coda. What follows unit 4 is now 2 and now 5, so 5 is not
    gathered before the last iteration is over; in backward 1 comes while 2 still computes."""
    stack = RECURRENT["stack"] | {"mean_iterations": 3}
    model = UNEQUAL | {"n_layers": 4, "stack": stack, "residual": {"type": "pre"}, "layers": WIDE}
    forward = "gather 0 gather 1 run 0 gather 2 run 1 gather 3 run 2 gather 4 run 3 run 4 run 2 run 3 run 4"
    forward += " run 2 run 3 run 4 gather 5 gather 6 run 5 run 6"
    backward = "gather 5 reduce 6 reduce 5 gather 1 reduce 4 reduce 3 reduce 2 reduce 1 reduce 0"
    for events in pool2.run(gathers_and_runs, {"model": model}):
        assert " ".join(events) == f"{forward} {backward}"


def test_gathers_follow_the_schedule_of_a_shared_stack(pool2):
    """0 1 1 0 of two blocks, which stay gathered: the head, that follows the first block at its second run only, is not
    asked for at its first."""
    stack = {"type": "scheduled", "schedule": [0, 1, 1, 0]}
    layers = [{"at": "1,2", "ffn": {"hidden": 64}}]
    model = UNEQUAL | {"n_layers": 4, "stack": stack, "layers": layers}
    forward = "gather 0 gather 1 run 0 run 1 gather 2 run 2 run 2 run 1 gather 3 run 3"
    for events in pool2.run(gathers_and_runs, {"model": model}):
        assert " ".join(events) == f"{forward} reduce 3 reduce 2 reduce 1 reduce 0"
