"""PEER against brute force over all experts, against another implementation, and as a dense network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.ffn.moe_cases import D, context, inputs, make
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.ffn.peer import PEER

ATOL = 1e-5
"""fp32, one module, outputs of a few units."""
SIZES: dict[str, Any] = {"n_keys": 8, "n_heads": 3, "top_k": 4, "query_dim": 16}


def peer(**table: Any) -> PEER:
    made: PEER = make("peer", **(SIZES | {"query_norm": "none"} | table))
    return made


def brute_force(layer: PEER, x: Tensor, keys: str) -> Tensor:
    """Every one of the n^2 experts is scored, for each head and token by itself, in float64."""
    p = {name: t.detach().double() for name, t in layer.named_parameters()}
    n, H, k = layer.n_keys, layer.n_heads, layer.top_k
    q = (x.double() @ p["query.weight"].t()).unflatten(-1, (H, -1))
    y = torch.zeros_like(x, dtype=torch.float64)
    for h in range(H):
        table = p["keys"][:, 0 if keys == "shared" else h]
        first, second = q[..., h, :].chunk(2, dim=-1)
        scores = (first @ table[0].t())[..., :, None] + (second @ table[1].t())[..., None, :]
        best, experts = scores.flatten(-2).topk(k)  # (B, T, k) of all n * n
        g = best.softmax(-1)
        for i in range(k):
            u, v = p["u"][experts[..., i]], p["v"][experts[..., i]]
            inner = (u * x.double()).sum(-1)
            gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
            y += (g[..., i] * gelu)[..., None] * v
    assert n * n == len(p["u"])
    return y


@pytest.mark.parametrize("keys", ["shared", "per_head"])
@pytest.mark.parametrize(("n_keys", "top_k"), [(8, 4), (64, 16), (4, 1)])
def test_brute_force_over_all_experts(keys: str, n_keys: int, top_k: int):
    layer, x = peer(n_keys=n_keys, top_k=top_k, keys=keys), inputs()
    y = layer(x, context())
    assert y.std() > 0.1
    torch.testing.assert_close(y, brute_force(layer, x, keys).float(), atol=10 * ATOL, rtol=ATOL)


def test_retrieval_finds_the_best_of_all():
    layer, x = peer(n_keys=64, top_k=16), inputs(8, 32)
    experts, scores = layer.retrieve(x, context())
    q = layer.query(x).unflatten(-1, (3, 2, -1))  # (B, T, H, 2, 8)
    every = torch.einsum("bthd,nd->bthn", q[..., 0, :], layer.keys[0, 0])[..., :, None]
    every = (every + torch.einsum("bthd,nd->bthn", q[..., 1, :], layer.keys[1, 0])[..., None, :]).flatten(-2)
    expected, where = every.topk(16)
    torch.testing.assert_close(scores, expected, atol=ATOL, rtol=ATOL)
    assert (experts == where).float().mean() > 0.999  # but for ties within rounding


@pytest.mark.parametrize("keys", ["shared", "per_head"])
def test_peer_pytorch(keys: str):
    """lucidrains' PEER, which has keys of its own for each head: ours shares the same ones, or not."""
    import PEER_pytorch

    layer, x = peer(keys=keys), inputs()
    reference = PEER_pytorch.PEER(
        D, heads=3, num_experts=64, num_experts_per_head=4, dim_key=8, non_competing_scores=False
    )
    with torch.no_grad():
        reference.weight_down_embed.weight.copy_(layer.u)
        reference.weight_up_embed.weight.copy_(layer.v)
        reference.keys.copy_(layer.keys.expand(2, 3, -1, -1).permute(1, 2, 0, 3))
        halves = layer.query.weight.unflatten(0, (3, 2, 8)).transpose(0, 1)  # theirs: all first halves, then all second
        reference.to_queries[0].weight.copy_(halves.flatten(0, 2))
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(mine, context()), reference(other)
    torch.testing.assert_close(y, expected, atol=ATOL, rtol=ATOL)
    for result in (y, expected):
        (result * torch.arange(D) / D).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=10 * ATOL, rtol=ATOL)
    torch.testing.assert_close(layer.u.grad, reference.weight_down_embed.weight.grad, atol=10 * ATOL, rtol=ATOL)
    torch.testing.assert_close(layer.v.grad, reference.weight_up_embed.weight.grad, atol=10 * ATOL, rtol=ATOL)
    theirs = reference.keys.grad.permute(2, 0, 1, 3)
    theirs = theirs.sum(1, keepdim=True) if keys == "shared" else theirs
    torch.testing.assert_close(layer.keys.grad, theirs, atol=10 * ATOL, rtol=ATOL)


def test_all_experts_are_a_dense_network():
    """k = N: two matrices with the experts as hidden units, each weighted by the softmax of all scores."""
    layer, x = peer(n_keys=3, top_k=9, n_heads=1), inputs()
    first, second = layer.query(x).chunk(2, dim=-1)
    scores = (first @ layer.keys[0, 0].t())[..., :, None] + (second @ layer.keys[1, 0].t())[..., None, :]
    dense = (scores.flatten(-2).softmax(-1) * F.gelu(x @ layer.u.t())) @ layer.v
    torch.testing.assert_close(layer(x, context()), dense, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("query_norm", ["none", "rms", "batch"])
def test_a_token_changes_no_other(query_norm: str):
    layer, x = peer(query_norm=query_norm), inputs()
    changed = x.clone()
    changed[1, 3] += 1
    before, after = layer(x, context()), layer(changed, context())
    same = torch.ones(3, 7, dtype=torch.bool)
    same[1, 3] = False
    torch.testing.assert_close(after[same], before[same], atol=1e-6, rtol=0)
    assert (after[~same] - before[~same]).abs().max() > 0.1


def test_rms_query_norm():
    layer, x = peer(query_norm={"type": "rms", "eps": 1e-6}), inputs()
    with torch.no_grad():
        layer.query_norm.weight.copy_(torch.linspace(0.5, 2, 16))
    q = layer.query(x).unflatten(-1, (3, 16))
    expected = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.linspace(0.5, 2, 16)
    torch.testing.assert_close(layer.query_norm(q, context()), expected, atol=ATOL, rtol=ATOL)


def test_batch_query_norm_is_torch_s_with_statistics_of_the_global_batch():
    """Two micro-batches, then evaluation; another implementation of the same statistics: torch's BatchNorm1d."""
    norm = peer(query_norm={"type": "batch", "decay": 0.9}).query_norm
    reference = torch.nn.BatchNorm1d(48, momentum=0.1)
    with torch.no_grad():
        for p in (norm.weight, norm.bias):
            p.copy_(torch.randn(48, generator=torch.Generator().manual_seed(3)))
        reference.weight.copy_(norm.weight)
        reference.bias.copy_(norm.bias)
    parts = [torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(2)]
    for part in parts:
        expected = torch.nn.functional.batch_norm(
            part.reshape(14, 48), None, None, reference.weight, reference.bias, training=True
        )
        torch.testing.assert_close(norm(part, context(1.0)).reshape(14, 48), expected, atol=ATOL, rtol=ATOL)
    norm.after_step(lambda total: total)
    whole = torch.cat(parts).reshape(28, 48)
    reference(whole)
    torch.testing.assert_close(norm.mean, reference.running_mean, atol=ATOL, rtol=ATOL)
    # torch keeps the unbiased variance.
    torch.testing.assert_close(norm.variance, 0.9 + 0.1 * whole.var(0, correction=0), atol=ATOL, rtol=1e-4)
    reference.eval()
    reference.running_var.copy_(norm.variance)
    torch.testing.assert_close(
        norm(parts[0], context()).reshape(14, 48), reference(parts[0].reshape(14, 48)), atol=ATOL, rtol=ATOL
    )


def test_statistics_do_not_see_that_something_was_computed_twice():
    """As where activations are recomputed; and nothing was seen at all before the first step."""
    once, twice = (peer(query_norm="batch").query_norm for _ in range(2))
    part = inputs(2, 7, 48).unflatten(-1, (3, 16))
    for norm, times in ((once, 1), (twice, 2)):
        assert torch.equal(norm.mean, torch.zeros(48))
        assert torch.equal(norm.variance, torch.ones(48))
        for _ in range(times):
            norm(part, context(1.0))
        norm.after_step(lambda total: total)
    torch.testing.assert_close(once.mean, twice.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(once.variance, twice.variance, atol=1e-6, rtol=0)
    assert once.mean.abs().max() > 0.01


def test_batch_norm_says_that_it_depends_on_the_layout():
    tables: dict[str, Any] = {"model": {"ffn": {"type": "peer", "n_keys": 8, "query_norm": "batch", "top_k": 4}}}
    (line,) = [line for line in job_from_dict(tables).warnings if "query_norm" in line]
    assert "training.local_batch_size" in line


def test_usage():
    layer = peer(n_heads=1, top_k=1, n_keys=2)
    for experts in ([0, 0, 1], [1]):
        layer.tally.add(torch.tensor(experts))
    layer.after_step(lambda total: total)
    found = layer.metrics(lambda count: count)
    assert found["used_experts"] == 0.5
    assert found["usage_kl"].item() == pytest.approx(0.6931472)  # ln 4 - ln 2
    layer(inputs(), context(1.0))
    layer.after_step(lambda total: total)
    assert layer.tally.last is not None
    assert layer.tally.last.sum() == 21
    layer(inputs(), context())
    assert not layer.tally.count.any()


@pytest.mark.parametrize("query_norm", ["rms", "batch"])
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_and_the_same_numbers(query_norm: str, training: bool):
    eager, compiled = (peer(query_norm=query_norm) for _ in range(2))
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    results = []
    for layer in (eager, compiled):
        x = inputs().requires_grad_()
        y = layer(x, context(1.0 if training else None))
        y.sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=ATOL, rtol=ATOL)


def test_bfloat16():
    layer, x = peer().bfloat16(), inputs().bfloat16()
    y = layer(x, context())
    assert y.dtype == torch.bfloat16
    exact = brute_force(layer, x, "shared").float()
    # A rounded query may choose another expert of nearly the same score, so not element by element.
    assert (y.float() - exact).norm() < 0.1 * exact.norm()


def test_refusals():
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"ffn": {"type": "peer", "n_keys": 8, "top_k": 65}}})
    (problem,) = caught.value.problems
    assert (problem.code, problem.key, problem.allowed) == (CROSS_FIELD, "model.ffn.top_k", "1 to 64")
    assert "n_keys = 8" in problem.why
    with pytest.raises(ConfigError, match="must be even"):
        job_from_dict({"model": {"ffn": {"type": "peer", "query_dim": 15}}})
    for zero in ("n_keys", "n_heads", "top_k", "query_dim"):
        with pytest.raises(ConfigError):
            job_from_dict({"model": {"ffn": {"type": "peer", zero: 0}}})
