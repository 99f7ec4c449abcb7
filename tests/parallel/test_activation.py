"""What a block of the llama3 preset keeps for backward: in each mode the bytes that are counted by hand."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.runs import VOCAB, build_tiny, global_batch, train
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.context import Context
from titan_lite.models.stack import Streams
from titan_lite.models.transformer import Transformer
from titan_lite.parallel import offload
from titan_lite.parallel.activation import apply_activation_checkpointing
from titan_lite.parallel.compile import compile_blocks
from titan_lite.parallel.config import ActivationCheckpoint, Compile
from titan_lite.step import mean_loss

B, T = 2, 48
N = B * T
D, H, G, DH, F = 128, 8, 4, 16, 384
"""The debugmodel of the llama3 preset."""
NORM = 3 * N * D + N
"""Elements that one norm keeps: its input, the reciprocal roots, the normed input, and the result with the gain."""
ATTENTION = N * H * DH + 2 * N * G * DH + N * H * DH + N * H
"""Rotated queries and keys, values, the result, the logarithms of the sums."""
WHOLE = 2 * NORM + ATTENTION + N * H * DH + 4 * N * F
"""Beside norms and attention the input of the output projection, in its order of elements; the gate and its activation,
the up projection, their product."""
PER_OP = N * D + (N * H * DH + N * H) + N * H * DH + N * G * DH + N * F + N * D
"""The block's input; attention; every second of the products q, k, v, o, gate, up, down."""
TABLES = T * DH
"""The rotation's cosines and sines, which all blocks share."""


class Kept(TorchDispatchMode):
    """Storages that operators made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int, torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        given |= {leaf._cdata for leaf in leaves if isinstance(leaf, torch.UntypedStorage)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes(), leaf.dtype))
        return out

    def alive(self) -> dict[torch.dtype, int]:
        """Bytes of those that still are, by the type of their elements."""
        gc.collect()
        sizes: dict[torch.dtype, int] = {}
        for reference, size, dtype in self.made.values():
            if not reference.expired():
                sizes[dtype] = sizes.get(dtype, 0) + size
        return sizes


class Inputs(NamedTuple):
    """A model and what its first block is called with."""

    model: Transformer
    x: Tensor
    context: Context

    def run(self) -> Tensor:
        streams: Streams = self.model.stack(self.x, self.context)
        return streams.x


def llama(n_layers: int, config: ActivationCheckpoint, compiled: Compile | None = None) -> Inputs:
    torch.manual_seed(0)
    tables = {"name": "llama3", "flavor": "debugmodel", "n_layers": n_layers}
    model: Transformer = job_from_dict({"model": tables, "activation_checkpoint": {"mode": "none"}}).model.build(
        vocab_size=VOCAB
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    apply_activation_checkpointing(model, config)
    compile_blocks(model, compiled or Compile(), config)
    if config.offload:
        offload.offload_activations(model)
    context = model.context(torch.randint(VOCAB, (B, T)))
    return Inputs(model, torch.randn(B, T, D, requires_grad=True), context)


def kept_elements(n_layers: int, **config: Any) -> float:
    """Elements of float32 that are kept beside parameters, the result, and what all blocks share."""
    inputs = llama(n_layers, ActivationCheckpoint(**config))
    with Kept() as kept:
        y = inputs.run()
        found = kept.alive()
    assert found.keys() == {torch.float32}
    return (found[torch.float32] - y.untyped_storage().nbytes()) / 4 + inputs.x.numel()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"mode": "none"}, [WHOLE, WHOLE, WHOLE]),
        ({"mode": "full"}, [N * D, N * D, N * D]),
        ({"mode": "selective", "selective_ac_option": "2"}, [WHOLE, N * D, WHOLE]),
        ({"mode": "selective", "selective_ac_option": "op"}, [PER_OP, PER_OP, PER_OP]),
        (
            {
                "mode": "selective",
                "selective_ac_option": "op",
                "per_op_sac_force_recompute_mm_shapes_by_fqns": ["down"],
            },
            [PER_OP - N * D] * 3,
        ),
    ],
    ids=["none", "full", "every second", "per op", "per op but down"],
)
def test_kept_bytes_are_those_counted_by_hand(config: dict[str, Any], expected: list[int]):
    assert kept_elements(3, **config) == sum(expected)
    assert kept_elements(1, **config) == expected[0]


def saved_elements(budget: float) -> float:
    """What a compiled block leaves for backward, seen by hooks as no eager operators run in it."""
    config = ActivationCheckpoint(mode="memory_budget", memory_budget=budget)
    inputs = llama(1, config, Compile(enable=True, backend="aot_eager"))
    sizes: dict[int, int] = {}
    parameters = offload.ParameterStorages(inputs.model)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage() not in parameters:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = inputs.run()
    y.sum().backward()
    return sum(sizes.values()) / 4


def test_memory_budgets_keep_less_and_less():
    """With 0 the block's input alone, as a checkpoint of the block does; tables and smaller are left out."""
    amounts = [saved_elements(budget) for budget in (1.0, 0.5, 0.0)]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] > N * F
    assert N * D <= amounts[2] <= N * D + TABLES + N
    assert amounts[1] < 0.75 * amounts[0]


SMALL = 2 * N + N * H
"""Of a block: the norms' roots and attention's logarithms of sums, each less than a page."""


@pytest.mark.parametrize(
    ("mode", "moved", "stays"), [("none", WHOLE - SMALL, SMALL), ("full", N * D, 0)], ids=["none", "full"]
)
def test_offloaded_activations_leave_the_device_once_each(mode: str, moved: int, stays: int):
    """What is less than a page stays. Copies are bytes, which tells them apart where all memory is the host's."""
    inputs = llama(1, ActivationCheckpoint(mode=mode, offload=True))
    with Kept() as kept:
        y = inputs.run()
        found = kept.alive()
    assert found[torch.uint8] == 4 * moved
    assert found[torch.float32] - y.untyped_storage().nbytes() == 4 * stays
    y.sum().backward()
    del y
    assert torch.uint8 not in kept.alive()


def gradients(sections: dict[str, Any]) -> dict[str, Tensor]:
    training = build_tiny(sections)[1]
    mean_loss(training, global_batch(0), 100.0, 0).backward()
    return {name: parameter.grad for name, parameter in training.model.named_parameters()}


@pytest.mark.parametrize(
    "checkpointing",
    [{"mode": "none"}, {"mode": "full"}, {"mode": "selective", "selective_ac_option": "2"}],
    ids=["none", "full", "every second"],
)
def test_offloading_changes_no_bit(checkpointing: dict[str, Any]):
    reference = gradients({})
    offloaded = gradients({"activation_checkpoint": checkpointing | {"offload": True}})
    assert offloaded.keys() == reference.keys()
    assert all(torch.equal(offloaded[name], gradient) for name, gradient in reference.items())


def test_activations_come_back_before_they_are_asked_for():
    """The last saved first, and a few ahead: never all of them."""
    store = offload.HostStore(offload.ParameterStorages(nn.Module()))
    tensors = [torch.full((2048,), float(i)) for i in range(10)]
    packed = [store.pack(tensor) for tensor in tensors]
    back: list[int] = []
    for number in reversed(range(10)):
        assert torch.equal(store.unpack(packed[number]), tensors[number])
        back.append(sum(view.stored._back is not None for view in packed))
    assert back == [5, 6, 7, 8, 9, 10, 10, 10, 10, 10]


def test_views_and_versions_of_a_storage():
    """Two views are one copy; after a change in place there are two."""
    store = offload.HostStore(offload.ParameterStorages(nn.Module()))
    x = torch.randn(64, 64)
    first, second = store.pack(x[3:, :5]), store.pack(x.t())
    assert first.stored is second.stored
    before = x.clone()
    x.mul_(2)
    third = store.pack(x)
    assert third.stored is not first.stored
    assert torch.equal(store.unpack(first), before[3:, :5])
    assert torch.equal(store.unpack(second), before.t())
    assert torch.equal(store.unpack(third), x)


OFFLOADED = {"training": {"local_batch_size": 2, "global_batch_size": 8}}


def offloaded_bytes(sections: dict[str, Any]) -> list[int]:
    """Bytes that went to host memory in the first and in a later step."""
    training = build_tiny(sections)[1]
    sizes: list[int] = []
    original, total = offload._to_host, 0

    def counting(source: Tensor) -> Tensor:
        nonlocal total
        total += source.nbytes
        return original(source)

    offload._to_host = counting
    try:
        for index in range(2):
            total = 0
            mean_loss(training, global_batch(index), 100.0, index).backward()
            sizes.append(total)
    finally:
        offload._to_host = original
    return sizes


@pytest.mark.parametrize("more", [{}, {"compile": {"enable": True, "backend": "aot_eager"}}], ids=["eager", "compiled"])
def test_gathered_parameters_are_no_activations(pool2, more: dict[str, Any]):
    """Under FSDP as much goes to host memory as in one process, from the first step on."""
    sections = more | {"activation_checkpoint": {"mode": "none", "offload": True}}
    alone = offloaded_bytes(sections)
    assert alone[0] == alone[1] > 0
    assert pool2.run(offloaded_bytes, sections) == [alone, alone]


@pytest.mark.parametrize(
    "more",
    [
        {"activation_checkpoint": {"mode": "none", "offload": True}},
        {
            "activation_checkpoint": {"mode": "full", "offload": True},
            "compile": {"enable": True, "backend": "aot_eager"},
        },
        {
            "activation_checkpoint": {"mode": "memory_budget", "memory_budget": 0.3},
            "compile": {"enable": True, "backend": "aot_eager"},
        },
    ],
    ids=["offloaded", "offloaded, full, compiled", "memory budget"],
)
def test_sharded_and_accumulated_equals_one_process(pool2, more: dict[str, Any]):
    reference = train({"training": {"local_batch_size": 8, "global_batch_size": 8}}, 3)
    for run in pool2.run(train, OFFLOADED | more, 3):
        torch.testing.assert_close(run.losses, reference.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(run.norms, reference.norms, rtol=1e-4, atol=0)
        assert run.weights.keys() == reference.weights.keys()


@pytest.mark.parametrize(
    ("tables", "key", "reason"),
    [
        ({"activation_checkpoint": {"mode": "memory_budget"}}, "mode", "compile.enable"),
        (
            {
                "activation_checkpoint": {"mode": "memory_budget"},
                "compile": {"enable": True, "components": ["loss"]},
            },
            "mode",
            "compile.components",
        ),
        (
            {"activation_checkpoint": {"mode": "memory_budget"}, "compile": {"enable": True, "backend": "eager"}},
            "mode",
            "does not run",
        ),
        ({"activation_checkpoint": {"selective_ac_option": "op", "offload": True}}, "offload", "a store of their own"),
        (
            {"activation_checkpoint": {"mode": "full", "early_stop": True}, "compile": {"enable": True}},
            "early_stop",
            "early_stop = false",
        ),
        (
            {"activation_checkpoint": {"mode": "full", "debug": True}, "compile": {"enable": True}},
            "debug",
            "debug = false",
        ),
    ],
)
def test_refused_with_the_reason(tables: dict[str, Any], key: str, reason: str):
    with pytest.raises(ConfigError, match=rf"(?s)activation_checkpoint\.{key}.*{reason}"):
        job_from_dict(tables)
