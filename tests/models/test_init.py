"""Initial weights: a pure function of (seed, name, shape), with the distribution that was asked for."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titan_lite.models.init import Distribution, Init, TruncatedNormal, base, initialize
from titan_lite.models.spec import Role, Spec, Start

DIM, LAYERS = 512, 8
ORTHOGONAL_ATOL = 1e-5


def build(table: str | dict) -> Distribution:
    return Init.Config.choose(table).build(dim=DIM, n_layers=LAYERS)


class Uneven(nn.Module):
    """Rows that no rank count divides, and a matrix of several blocks; made in an order that does not matter."""

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        shapes = {"narrow": (7, 3), "tall": (1031, 64), "gain": (5,), "square": (33, 33), "experts": (3, 5, 8)}
        for name in list(shapes)[::order]:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])))


SPECS = {
    "narrow": Spec("hidden", 3, 7),
    "tall": Spec("hidden", 64, 1031, "residual"),
    "gain": Spec("norm", 1, 5, 1.0),
    "square": Spec("hidden", 33, 33),
    "experts": Spec("expert", 8, 5),
}
RULES = [
    {"match": "narrow", "init": "xavier_uniform"},
    {"match": "square", "init": "orthogonal"},
    {"role": "expert", "init": "orthogonal"},
]
INIT = {"type": "truncated_normal", "rules": RULES}


def whole(seed: int = 0, order: int = 1, init: str | dict = INIT) -> dict[str, Tensor]:
    model = Uneven(order)
    initialize(model, SPECS, build(init), seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sharded(replicate: int) -> dict[str, Tensor]:
    """All parameters gathered from a sharded model, and this rank's own shard of `tall`."""
    mesh = init_device_mesh(
        "cpu", (replicate, dist.get_world_size() // replicate), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    model = fully_shard(Uneven().to("meta"), mesh=mesh if replicate > 1 else mesh["dp_shard"])
    model.to_empty(device="cpu")
    with mock.patch.object(base, "BLOCK_ELEMENTS", 4096):
        initialize(model, SPECS, build(INIT), 0)
    out = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return out | {"shard": model.tall.to_local().detach()}


def test_init_same_for_every_layout(pool2, pool4, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 4096)
    expected = whole()
    for pool, replicate in ((pool2, 1), (pool4, 1), (pool4, 2)):
        results = pool.run(sharded, replicate)
        for result in results:
            for name, tensor in expected.items():
                assert torch.equal(result[name], tensor), (name, replicate)
        # DTensor's own init would give every rank the same shard.
        assert not torch.equal(results[0]["shard"], results[1]["shard"])


def test_init_depends_on_seed_and_name_and_not_on_the_order():
    first = whole(0)
    for name, tensor in whole(0, order=-1).items():
        assert torch.equal(first[name], tensor), name
    for name, tensor in whole(1).items():
        assert torch.equal(first[name], tensor) == (name == "gain"), name
    assert torch.equal(first["gain"], torch.ones(5))
    assert not torch.equal(first["experts"][0], first["experts"][1])


def test_the_bits_of_the_default_init(monkeypatch):
    """The contract spelled out: block by block, each from the hash of seed, name and block."""
    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 4096)
    tall, std = whole(3, init="truncated_normal")["tall"], 0.02 / 4
    for block in range(17):  # of 64 rows, the last one shorter
        generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(f"3/tall/{block}".encode()) // 2)
        expected = torch.empty(min(64, 1031 - 64 * block), 64)
        nn.init.trunc_normal_(expected, std=std, a=-3 * std, b=3 * std, generator=generator)
        assert torch.equal(tall[64 * block : 64 * (block + 1)], expected)


N = 1024 * 512
STD_RTOL = 5 * (2 * N) ** -0.5
"""Five standard errors of the standard deviation of so many normal draws; other distributions here have less."""
SHARE_ATOL = 5 * (0.25 / N) ** 0.5


def draw(table: str | dict, start: Start = "weight", role: Role = "hidden", fan_in: int = 512) -> Tensor:
    """A matrix (1024, 512)."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(1024, 512))
    initialize(model, {"weight": Spec(role, fan_in, 1024, start)}, build(table), 0)
    return model.weight.detach()


CUT = 0.98658
"""Standard deviation of a standard normal cut at 3: sqrt(1 - 6 phi(3) / (2 Phi(3) - 1))."""
NORMAL, UNIFORM, CUT_NORMAL = (0.68269, math.inf), (0.57735, 3**0.5), (0.67639, 3 / CUT)
"""Share of the draws within one standard deviation of 0, and how many of these the largest draw may be away from it."""
DEPTH = (2 * LAYERS) ** -0.5


@pytest.mark.parametrize(
    ("table", "std", "shape", "residual"),
    [
        ("truncated_normal", 0.02 * CUT, CUT_NORMAL, DEPTH),
        ({"type": "truncated_normal", "std": 0.5, "depth_scaled": False}, 0.5 * CUT, CUT_NORMAL, 1),
        ("normal", 0.02, NORMAL, DEPTH),
        ({"type": "normal", "std": 0.3, "depth_scaled": False}, 0.3, NORMAL, 1),
        ("fan_in", 512**-0.5, NORMAL, DEPTH),
        ({"type": "fan_in", "gain": 3.0, "power": 1.0, "depth_scaled": False}, 3 / 512, NORMAL, 1),
        ({"type": "fan_in", "distribution": "truncated"}, 512**-0.5 * CUT, CUT_NORMAL, DEPTH),
        ("xavier_uniform", (2 / 1536) ** 0.5, UNIFORM, 1),
        ({"type": "xavier_normal", "gain": 2.0}, 2 * (2 / 1536) ** 0.5, NORMAL, 1),
        ("kaiming_uniform", (2 / 512) ** 0.5, UNIFORM, 1),
        ({"type": "kaiming_normal", "gain": 0.5}, 0.5 * 512**-0.5, NORMAL, 1),
        ("like", (2 / (5 * DIM)) ** 0.5, NORMAL, DEPTH),
    ],
    ids=str,
)
def test_moments(table: str | dict, std: float, shape: tuple[float, float], residual: float):
    for start, factor in (("weight", 1), ("residual", residual)):
        weight = draw(table, start) / (std * factor)
        share, furthest = shape
        assert abs(weight.mean().item()) < 5 * N**-0.5
        assert weight.std().item() == pytest.approx(1, rel=STD_RTOL)
        assert (weight.abs() < 1).float().mean().item() == pytest.approx(share, abs=SHARE_ATOL)
        assert weight.abs().max() <= furthest * (1 + 1e-5)
        assert weight.abs().max() > min(furthest, 4.3) * 0.99


@pytest.mark.parametrize(
    ("table", "reference"),
    [
        ({"type": "xavier_uniform", "gain": 1.5}, lambda w, g: nn.init.xavier_uniform_(w, 1.5, generator=g)),
        ({"type": "xavier_normal", "gain": 1.5}, lambda w, g: nn.init.xavier_normal_(w, 1.5, generator=g)),
        ("kaiming_uniform", lambda w, g: nn.init.kaiming_uniform_(w, nonlinearity="relu", generator=g)),
        ("kaiming_normal", lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g)),
        ({"type": "orthogonal", "gain": 1.5}, lambda w, g: nn.init.orthogonal_(w, 1.5, generator=g)),
    ],
    ids=["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal"],
)
def test_against_torch(table: str | dict, reference):
    """The same generator and fans give what torch.nn.init makes of a linear layer's weight."""
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(b"0/weight/0") // 2)
    expected = reference(torch.empty(1024, 512), generator)
    torch.testing.assert_close(draw(table), expected, rtol=1e-6, atol=0)


def test_embeddings_have_a_fan_in_of_one():
    weight = draw({"type": "fan_in", "gain": 0.7}, role="embed", fan_in=1)
    assert weight.std().item() == pytest.approx(0.7, rel=STD_RTOL)


def test_zeros():
    assert not draw("zeros").any()
    assert not draw("zeros", "residual").any()


def test_orthogonal():
    tall, wide = draw({"type": "orthogonal", "gain": 2.0}), whole(init="orthogonal")["experts"]
    torch.testing.assert_close(tall.t() @ tall, 4 * torch.eye(512), atol=ORTHOGONAL_ATOL, rtol=0)
    torch.testing.assert_close(wide @ wide.mT, torch.eye(5).expand(3, 5, 5), atol=ORTHOGONAL_ATOL, rtol=0)


def test_orthogonal_does_not_depend_on_the_number_of_threads():
    expected, threads = draw("orthogonal"), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(draw("orthogonal"), expected)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_weights_in_bfloat16_are_the_rounded_ones():
    model = Uneven().bfloat16()
    initialize(model, SPECS, build(INIT), 0)
    for name, expected in whole().items():
        assert torch.equal(model.get_parameter(name), expected.bfloat16())


def test_the_default_is_the_truncated_normal():
    assert type(build({})) is TruncatedNormal
