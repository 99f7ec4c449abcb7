"""Initial weights are a pure function of (seed, name, shape)."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titan_lite.models import init
from titan_lite.models.init import TruncatedNormal, initialize
from titan_lite.models.spec import Spec


class Uneven(nn.Module):
    """Rows that no rank count divides, and a matrix of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.empty(7, 3))
        self.tall = nn.Parameter(torch.empty(1031, 64))
        self.gain = nn.Parameter(torch.empty(5))


SPECS = {
    "narrow": Spec("hidden", 3, 7),
    "tall": Spec("hidden", 64, 1031, "residual"),
    "gain": Spec("norm", 1, 5, 1.0),
}
INIT = TruncatedNormal(TruncatedNormal.Config(), n_layers=8)


def whole(seed: int = 0) -> dict[str, torch.Tensor]:
    model = Uneven()
    initialize(model, SPECS, INIT, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sharded(replicate: int) -> dict[str, torch.Tensor]:
    """All parameters gathered from a sharded model, and this rank's own shard of `tall`."""
    mesh = init_device_mesh(
        "cpu", (replicate, dist.get_world_size() // replicate), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    model = fully_shard(Uneven().to("meta"), mesh=mesh if replicate > 1 else mesh["dp_shard"])
    model.to_empty(device="cpu")
    with mock.patch.object(init, "BLOCK_ELEMENTS", 4096):
        initialize(model, SPECS, INIT, 0)
    out = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return out | {"shard": model.tall.to_local().detach()}


def test_init_same_for_every_layout(pool2, pool4, monkeypatch):
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", 4096)
    expected = whole()
    for pool, replicate in ((pool2, 1), (pool4, 1), (pool4, 2)):
        results = pool.run(sharded, replicate)
        for result in results:
            for name, tensor in expected.items():
                assert torch.equal(result[name], tensor), (name, replicate)
        # DTensor's own init would give every rank the same shard.
        assert not torch.equal(results[0]["shard"], results[1]["shard"])


def test_init_depends_on_seed_and_name():
    assert torch.equal(whole(0)["narrow"], whole(0)["narrow"])
    assert not torch.equal(whole(0)["narrow"], whole(1)["narrow"])


def test_truncated_normal_moments():
    tall = whole()["tall"]
    std = 0.02 / (2 * 8) ** 0.5
    assert tall.abs().max() <= 3 * std
    # A normal cut at 3 sigma has 0.9866 of its standard deviation.
    torch.testing.assert_close(tall.std().item(), 0.9866 * std, rtol=0.01, atol=0)
    assert abs(tall.mean().item()) < 4 * std / tall.numel() ** 0.5
    assert torch.equal(whole()["gain"], torch.ones(5))
