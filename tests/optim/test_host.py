"""Optimizer states that live in host memory step like others, and are on the device for a bucket at a time only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.runs import build_tiny, train
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.optim import host
from titan_lite.optim.host import HostStates

OFFLOADED = {"training": {"local_batch_size": 4, "global_batch_size": 8, "enable_optimizer_offload": True}}
KEPT = {"training": {"local_batch_size": 4, "global_batch_size": 8}}


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (2, 2), (), (9, 4))]
    return [nn.Parameter(tensor.to(device)) for tensor in made]


def optimizer(params: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, **settings)


def step(used: torch.optim.Optimizer, params: list[nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    used.step()
    used.zero_grad()
    assert all(parameter.grad is None for parameter in params)


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("bucket", [1, 100, 10**9])
def test_equals_the_inner_optimizer_bit_for_bit(bucket: int, settings: dict[str, bool]):
    plain, moved = parameters(), parameters()
    reference, offloaded = optimizer(plain, **settings), HostStates(optimizer(moved, **settings), bucket)
    for number in range(3):
        step(reference, plain, number)
        step(offloaded, moved, number)
    assert all(map(torch.equal, moved, plain))
    for mine, other in zip(moved, plain, strict=True):
        states, expected = offloaded.state[mine], reference.state[other]
        assert states.keys() == expected.keys()
        assert all(torch.equal(states[name], value) for name, value in expected.items())
    assert [len(group["params"]) for group in offloaded.param_groups] == [3, 2]


def test_one_bucket_of_states_is_on_the_device():
    """With devices that are faked, as this machine may have one: parameters on a GPU, states in host memory."""
    places: list[tuple[str, int]] = []
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda:0")) for shape in ((5, 3), (7,), (9, 4))]
        inner = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False)
        offloaded = HostStates(inner, bucket_bytes=1)
        taken = inner.step

        def watched() -> None:
            taken()
            places.extend(_places(inner))

        inner.step = watched  # type: ignore[method-assign, assignment]
        for _ in range(2):
            for parameter in params:
                parameter.grad = torch.empty_like(parameter)
            offloaded.step()
            assert [place for place, _ in _places(inner)] == ["cpu"] * 3
    devices = [place for place, _ in places]
    # In the first step there is a state more after each bucket.
    assert devices[:6] == ["cuda", "cpu", "cuda", "cpu", "cpu", "cuda"]
    assert devices[6:] == ["cuda", "cpu", "cpu", "cpu", "cuda", "cpu", "cpu", "cpu", "cuda"]


def _places(used: torch.optim.Optimizer) -> list[tuple[str, int]]:
    """Device type and bytes of each state."""
    values = [value for states in used.state.values() for value in states.values() if isinstance(value, Tensor)]
    return [(value.device.type, value.nbytes) for value in values]


def moved_bytes(sections: dict[str, Any]) -> tuple[int, int]:
    """Bytes to the device and back in a step of a built model."""
    training = build_tiny(sections)[1]
    counts = {"on_device": 0, "on_host": 0}
    originals = {name: getattr(host, name) for name in counts}

    def counting(name: str) -> Any:
        def count(value: Tensor, *device: Any) -> Tensor:
            counts[name] += host.local(value).nbytes
            return originals[name](value, *device)

        return count

    for _ in range(2):
        for parameter in training.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        counts.update(dict.fromkeys(counts, 0))
        for name in counts:
            setattr(host, name, counting(name))
        try:
            training.optimizer.step()
        finally:
            for name, original in originals.items():
                setattr(host, name, original)
    return counts["on_device"], counts["on_host"]


def test_a_step_moves_eight_bytes_per_parameter_of_the_rank_both_ways(pool2):
    count = sum(parameter.numel() for parameter in build_tiny(KEPT)[1].model.parameters())
    assert moved_bytes(OFFLOADED) == (8 * count, 8 * count)
    assert pool2.run(moved_bytes, OFFLOADED) == [(4 * count, 4 * count)] * 2


def test_sharded_equals_one_process(pool2):
    """In one process bit for bit; and what is stepped on shards is what is stepped on shards without it."""
    reference, alone = train(KEPT, 3), train(OFFLOADED, 3)
    assert alone.losses == reference.losses
    assert all(torch.equal(alone.weights[name], weight) for name, weight in reference.weights.items())
    plain, moved = pool2.run(train, KEPT, 3)[0], pool2.run(train, OFFLOADED, 3)[0]
    assert moved.losses == plain.losses
    assert moved.norms == plain.norms
    assert all(torch.equal(moved.weights[name], weight) for name, weight in plain.weights.items())


def test_both_offloads_are_refused():
    tables = {"training": {"enable_cpu_offload": True, "enable_optimizer_offload": True}}
    with pytest.raises(ConfigError, match=r"(?s)training\.enable_optimizer_offload.*enable_cpu_offload"):
        job_from_dict(tables)
