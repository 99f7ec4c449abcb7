"""Every layout trains the same model: against one process, losses and gradient norms of ten steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runs import Run, train

RTOL = 1e-5
"""fp32: losses and gradient norms of ten steps."""
WEIGHT_ATOL = 2e-4
"""fp32: weights after ten steps of Adam at lr 1e-2, which turns rounding of tiny gradients into steps of that size."""
STEPS = 10


def sections(local_batch_size: int, **more: dict[str, Any]) -> dict[str, Any]:
    return {"training": {"local_batch_size": local_batch_size, "global_batch_size": 8}} | more


@pytest.fixture(scope="module")
def serial() -> Run:
    return train(sections(8), STEPS)


def assert_equal_runs(run: Run, reference: Run) -> None:
    torch.testing.assert_close(run.losses, reference.losses, rtol=RTOL, atol=0)
    torch.testing.assert_close(run.norms, reference.norms, rtol=RTOL * 10, atol=0)
    assert run.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=WEIGHT_ATOL, msg=name)


def test_loss_falls(serial: Run):
    """The batches are noise: what can be learnt is that their tokens are uniform."""
    assert serial.losses[0] > 4.1589 - 0.05  # ln 64
    assert serial.norms[0] > 0


@pytest.mark.parametrize("local_batch_size", [4, 1])
def test_accumulation_equals_one_batch(serial: Run, local_batch_size: int):
    assert_equal_runs(train(sections(local_batch_size), STEPS), serial)


@pytest.mark.parametrize(
    ("ranks", "local_batch_size", "parallelism"),
    [
        (2, 4, {}),
        (2, 2, {}),
        (2, 4, {"fsdp_reshard_after_forward": "never"}),
        (2, 4, {"fsdp_reshard_after_forward": "always"}),
        (4, 2, {}),
        (4, 1, {"data_parallel_replicate_degree": 2}),
        (2, 4, {"data_parallel_replicate_degree": 2}),
    ],
)
def test_fsdp_equals_one_process(
    serial: Run, pool2, pool4, ranks: int, local_batch_size: int, parallelism: dict[str, Any]
):
    pool = {2: pool2, 4: pool4}[ranks]
    for run in pool.run(train, sections(local_batch_size, parallelism=parallelism), STEPS):
        assert_equal_runs(run, serial)


@pytest.mark.parametrize("head", [{"tied": True}, {"tied": False}])
@pytest.mark.parametrize("masks", [["causal"], ["causal", "document"]])
def test_fsdp_equals_one_process_for_other_models(pool2, head: dict[str, Any], masks: list[str]):
    model = {"head": head, "attention": {"n_heads": 4, "n_kv_heads": 2, "masks": masks}}
    reference = train(sections(8, model=model), 3)
    for run in pool2.run(train, sections(2, model=model), 3):
        assert_equal_runs(run, reference)


@pytest.mark.parametrize("parallelism", [{}, {"data_parallel_replicate_degree": 2}], ids=["sharded", "replicas"])
def test_a_matrix_behind_the_table_is_there_in_backward(pool2, parallelism: dict[str, Any]):
    """Rows that are only looked up are not gathered again, what widens them is."""
    model = {"embedding": {"type": "low_rank", "width": 16}}
    reference = train(sections(8, model=model), 3)
    assert_equal_runs(pool2.run(train, sections(4, model=model, parallelism=parallelism), 3)[0], reference)


def test_chunked_loss_equals_dense(serial: Run, pool2):
    chunked = sections(4)
    chunked["training"]["loss_chunk_tokens"] = 24  # does not divide the 64 tokens of a micro-batch
    assert_equal_runs(train(chunked, STEPS), serial)
    assert_equal_runs(pool2.run(train, chunked, STEPS)[0], serial)


def test_cpu_offload_equals_one_process(serial: Run, pool2):
    offloaded = sections(4)
    offloaded["training"]["enable_cpu_offload"] = True
    assert_equal_runs(pool2.run(train, offloaded, STEPS)[0], serial)


@pytest.mark.parametrize(
    "checkpointing",
    [
        {"mode": "full"},
        {"mode": "selective", "selective_ac_option": "2"},
        {"mode": "selective", "selective_ac_option": "op"},
    ],
    ids=["full", "every second", "per op"],
)
def test_activation_checkpointing_is_bitwise_the_same(serial: Run, pool2, checkpointing: dict[str, Any]):
    run = train(sections(8, activation_checkpoint=checkpointing), STEPS)
    assert run.losses == serial.losses
    assert all(torch.equal(run.weights[name], weight) for name, weight in serial.weights.items())
    assert_equal_runs(pool2.run(train, sections(4, activation_checkpoint=checkpointing), STEPS)[0], serial)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_equals_eager(serial: Run, pool2, mode: str):
    """aot_eager runs all of the tracing; what inductor makes of the graph is tested by `test_inductor`."""
    compiled = {
        "compile": {"enable": True, "backend": "aot_eager"},
        "activation_checkpoint": {"mode": mode, "selective_ac_option": "op"},
    }
    assert_equal_runs(train(sections(8, **compiled), STEPS), serial)
    assert_equal_runs(pool2.run(train, sections(4, **compiled), STEPS)[0], serial)


def test_inductor_equals_eager(serial: Run):
    assert_equal_runs(train(sections(8, compile={"enable": True}), STEPS), serial)


def test_bfloat16_stays_near_float32(serial: Run, pool2):
    """Sharded bf16 compute with fp32 masters, and everything in bf16, against fp32."""
    mixed, pure = sections(4), sections(4)
    mixed["training"]["mixed_precision_param"] = "bfloat16"
    pure["training"] |= {"dtype": "bfloat16", "mixed_precision_param": "auto"}
    for changed, dtype in ((mixed, torch.float32), (pure, torch.bfloat16)):
        run = pool2.run(train, changed, 3)[0]
        assert {weight.dtype for weight in run.weights.values()} == {dtype}
        torch.testing.assert_close(run.losses, serial.losses[:3], rtol=5e-3, atol=0)
