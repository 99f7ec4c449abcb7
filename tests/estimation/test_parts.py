"""Each mechanism of the estimate against what is counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from estimation import rehearsal
from estimation.allocator import replay
from estimation.compute import Assumptions, compute_of
from estimation.devices import NAMES, device_of
from estimation.memory import memory_of
from estimation.ops import Op
from estimation.rehearsal import Rehearsal, rehearse
from estimation.repeat import Periods
from estimation.trace import Alloc, Free, Part, Trace
from titan_lite.config.load import job_from_dict

MIB = 2**20
B, T, D, F, V = 2, 128, 128, 256, 512


def tables(n_layers: int, **sections: Any) -> dict[str, Any]:
    model = {"dim": D, "n_layers": n_layers, "vocab_size": V, "ffn": {"type": "glu", "hidden": F}}
    model["attention"] = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
    training = {"local_batch_size": B, "seq_len": T, "loss_chunk_tokens": 0, "mixed_precision_param": "float32"}
    job: dict[str, Any] = {"model": model, "training": training, "activation_checkpoint": {"mode": "none"}}
    for name, section in sections.items():
        job[name] = job.get(name, {}) | section
    return job


def rehearsed(config: dict[str, Any], size: int = 1) -> Rehearsal:
    return rehearse(job_from_dict(config, size, files=False), size, on_device=True)


@pytest.mark.parametrize(
    "sections",
    [
        {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}},
        {"optimizer": {"implementation": "foreach"}, "training": {"global_batch_size": 32}},
        {"parallelism": {"tensor_parallel_degree": 2}, "activation_checkpoint": {"mode": "full"}},
        {"parallelism": {"pipeline_parallel_degree": 2}},
    ],
    ids=["every second", "foreach, accumulating", "tensor parallel, full", "pipeline"],
)
def test_layers_left_out_are_there(sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A trace of five layers or pairs, repeated, is the trace of all of them."""
    layers = 7 if sections.get("parallelism", {}).get("tensor_parallel_degree") else 12
    config = tables(layers, **sections)
    short = rehearsed(config, 4)
    monkeypatch.setattr(rehearsal, "_ways_to_repeat", lambda *_: [None])
    whole = rehearsed(config, 4)
    assert short.layers_traced < whole.layers_traced == layers
    assert memory_of(short.trace).peak.total == memory_of(whole.trace).peak.total
    assert _in_optimizer(short) == pytest.approx(_in_optimizer(whole), rel=0.01)
    device = device_of("h100-80gb")
    ours, theirs = (compute_of(each, device, Assumptions()) for each in (short, whole))
    assert ours.flops == theirs.flops
    assert ours.communication["dp_shard"].nbytes == pytest.approx(theirs.communication["dp_shard"].nbytes, rel=1e-3)
    assert ours.seconds == pytest.approx(theirs.seconds, rel=0.01)
    assert replay(short.trace.events) == replay(whole.trace.events)


def test_experts_over_ranks():
    """Tokens, spread evenly, travel over the `ep` axis four times a layer, and their numbers once."""
    config = tables(12, parallelism={"expert_parallel_degree": 8, "tensor_parallel_degree": 2})
    config["model"]["ffn"] = {"type": "moe", "n_experts": 32, "top_k": 4, "experts": {"hidden": 64}}
    found = rehearsed(config, 64)
    assert found.expert_axes == {"dp_replicate": 1, "dp_shard_mod_ep": 8, "ep": 8}
    moved = compute_of(found, device_of("h100-80gb"), Assumptions()).communication["ep"]
    assert moved.count == 12 * 5 + 1  # the last one adds up the norms of gradients, a few bytes
    assert moved.nbytes == pytest.approx(12 * (4 * (B * T // 2) * 4 * D * 4 + 32 * 4), rel=1e-5)


def _in_optimizer(found: Rehearsal) -> int:
    """The most bytes while it steps."""
    return max(moment.total for moment in memory_of(found.trace).timeline if moment.part.phase == "optimizer")


def test_saved_activations_of_a_block():
    """What is kept for backward, counted by hand, in float32."""
    op = {"mode": "selective", "selective_ac_option": "op"}
    none, full, op = (_saved(mode) for mode in ({"mode": "none"}, {"mode": "full"}, op))
    x, kv, hidden, row = B * T * D * 4, B * T * 64 * 4, B * T * F * 4, B * T * 4
    norm = x + row  # its result, which the matrices behind it keep, and one number per row
    attention = x + 2 * kv + 2 * x + B * 4 * T * 4  # rotated q and k, v; the result, twice, and its log-sum-exp
    # The stream between the branches, both norms, gate, its activation, up, and their product.
    assert none == pytest.approx(x + x + 2 * norm + attention + 4 * hidden, rel=0.02)
    assert full == x
    # The input; of q, k, v, the output matrix, gate, up and down each second product; attention's result.
    assert op == pytest.approx(x + x + kv + hidden + x + x + B * 4 * T * 4, rel=0.02)


def test_windows_keep_what_flash_attention_keeps():
    """On CUDA flex attention leaves out what a window hides, and holds neither the mask nor scores."""
    plain, windowed = (tables(3, training={"seq_len": 512}) for _ in range(2))
    windowed["model"]["attention"] |= {"masks": [{"type": "causal"}, {"type": "sliding_window", "window": 64}]}
    of_plain, of_windowed = (memory_of(rehearsed(each).trace).saved for each in (plain, windowed))
    assert of_windowed["stack.blocks.1"] == of_plain["stack.blocks.1"]


def _saved(checkpoint: dict[str, Any]) -> int:
    """By the second block, behind whose input the first has ended."""
    saved = memory_of(rehearsed(tables(3, activation_checkpoint=checkpoint)).trace).saved
    return saved["stack.blocks.1"]


def test_parameters_and_adam():
    """4 bytes of each parameter, and twice that, but for step counts; half of it all on each of two ranks."""
    n = 2 * V * D + D + 2 * (2 * D * D + 2 * D * 64 + 3 * D * F + 2 * D)
    for size in (1, 2):
        live = memory_of(rehearsed(tables(2), size).trace).peak.live
        assert live["parameters"] == pytest.approx(4 * n / size, rel=0.01)
        assert live["optimizer state"] == pytest.approx(8 * n / size, rel=0.01)


def test_layers_lie_on_a_line():
    two, three, four = (memory_of(rehearsed(tables(n)).trace).peak.total for n in (2, 3, 4))
    assert four - three == three - two


def test_recomputation_is_told_apart():
    device = device_of("h100-80gb")
    job = tables(2, activation_checkpoint={"mode": "full"})
    found = compute_of(rehearsed(job), device, Assumptions()).by_phase
    plain = compute_of(rehearsed(tables(2)), device, Assumptions()).by_phase
    head = 2 * B * T * V * D
    assert found["recompute"] == plain["forward"] - head
    assert (found["forward"], found["backward"]) == (plain["forward"], plain["backward"])


def test_logits_of_a_dense_loss():
    saved = memory_of(rehearsed(tables(2)).trace).saved
    assert saved["head"] >= B * T * V * 4


def test_collectives_of_sharded_layers():
    """Each parameter is gathered for forward and backward, and its gradient reduced; what is not resharded, once."""
    config = tables(3)
    found = compute_of(rehearsed(config, 4), device_of("h100-80gb"), Assumptions())
    block = (D * D * 2 + 2 * D * 64 + 3 * D * F + 2 * D) * 4
    ends = 2 * V * D * 4 + D * 4
    gathered = 2 * 3 * block + ends
    reduced = 3 * block + ends
    assert found.communication["dp_shard"].nbytes == pytest.approx(gathered + reduced, rel=1e-3)


def test_keys_and_values_that_are_passed_round():
    """Forward and backward, and in backward their gradients; parameters are sharded over these ranks, too."""
    n, layers = 4, 2
    layout = {"context_parallel_degree": n, "context_parallel_rotate_method": "alltoall"}
    found = compute_of(rehearsed(tables(layers, parallelism=layout), 8), device_of("h100-80gb"), Assumptions())
    assert found.communication["cp"].count == layers * 3 * (n - 1)
    assert found.communication["cp"].nbytes == layers * 3 * (n - 1) * B * (T // n) * 2 * 64 * 4
    assert found.communication["dp_shard+cp"].nbytes > 0


def test_rows_and_experts_on_the_same_ranks():
    """Of two times two ranks each has half of a row and half of the experts; what is not spread is sharded over all."""
    moe = {"type": "moe", "n_experts": 4, "top_k": 2, "experts": {"hidden": 16}}
    job = tables(1, parallelism={"context_parallel_degree": 2, "expert_parallel_degree": 2})
    job["model"]["ffn"] = moe
    found = compute_of(rehearsed(job, 4), device_of("h100-80gb"), Assumptions())
    assert found.communication.keys() == {"cp", "dp_shard+cp", "ep", "dp_shard_mod_ep"}


@pytest.mark.parametrize("more", [{}, {"context_parallel_rotate_method": "alltoall"}], ids=["gathered", "passed on"])
def test_rings_do_as_many_scores_as_one_rank(more: dict[str, str]):
    """Both leave out what the causal mask hides: half of a row, and the diagonal."""
    layout = {"context_parallel_degree": 2} | more
    alone, split = (_scores(rehearsed(tables(1), 1)), _scores(rehearsed(tables(1, parallelism=layout), 2)))
    products = 2 + 5  # forward, and backward, which computes the scores once more
    assert alone == products * 2 * B * D * T * (T + 1) / 2
    assert split == alone / 2


def _scores(found: Rehearsal) -> float:
    return sum(op.flops * op.done for op in found.trace.events if isinstance(op, Op) and op.kind == "attention")


def test_a_collective_crosses_the_narrowest_link():
    device, exact = device_of("h100-80gb"), Assumptions(latency_us=0.0, link_efficiency=1.0, data_parallel_overlap=0.0)
    op = Op("all_gather_into_tensor", "collective", torch.float32, 0, 2**30, "g")
    trace = Trace([op], [(0, Part("forward", "", 0))])

    def seconds(over: str = "dp_shard", **axes: int) -> float:
        return compute_of(Rehearsal(trace, {"g": over}, axes, {}, 1, 1, 1, 1), device, exact).seconds

    assert seconds(dp_replicate=1, dp_shard=8) == pytest.approx(2**30 * 7 / 8 / 450e9)
    assert seconds(dp_replicate=1, dp_shard=16) == pytest.approx(2**30 * 15 / 16 / 400e9)
    assert seconds(dp_replicate=1, dp_shard=16, tp=8) == pytest.approx(2**30 * 15 / 16 / 50e9)
    assert seconds("dp_shard+cp", dp_replicate=1, dp_shard=8, cp=2, tp=8) == pytest.approx(2**30 * 15 / 16 / 50e9)
    assert seconds("dp_shard+cp", dp_shard=2, cp=8, tp=8) == pytest.approx(2**30 * 15 / 16 / 50e9)


def test_allocator_rounds_up_and_reuses():
    def reserved(events: list[Alloc | Free], expandable: bool = False) -> int:
        return replay(events, expandable).reserved

    assert reserved([Alloc(1, 512, "")]) == 2 * MIB
    assert reserved([Alloc(1, 2 * MIB, "")]) == 20 * MIB
    assert reserved([Alloc(1, 11 * MIB, "")]) == 12 * MIB
    assert reserved([Alloc(1, 40 * MIB, ""), Free(1), Alloc(2, 40 * MIB, "")]) == 40 * MIB
    grown = [Alloc(1, 40 * MIB, ""), Free(1), Alloc(2, 60 * MIB, "")]
    assert reserved(grown) == 100 * MIB  # no free block is large enough, and none is given back
    assert reserved(grown, expandable=True) == 60 * MIB


def test_streams_do_not_share():
    """What one stream has freed is not there for another."""
    events = [Alloc(1, 40 * MIB, "", stream=1), Free(1), Alloc(2, 40 * MIB, "")]
    assert replay(events).reserved == 80 * MIB


def test_periods():
    assert Periods.of("aaaa") is None
    found = Periods.of("xababababababababz")
    assert found is not None
    assert (found.start, found.period, found.count, found.left_out) == (1, 2, 8, 6)
    assert found.kept == [0, 1, 2, 3, 4, 5, 6, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("name", NAMES)
def test_devices(name: str):
    device = device_of(name)
    assert device.name == name
    assert min(device.memory_gib, device.bf16, device.fp32, device.bandwidth, device.link) > 0
