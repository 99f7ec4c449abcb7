"""ALiBi against transformers' MPT and Bloom, and as attention sees it."""

from __future__ import annotations

import pytest
import torch

from tests.models.position.turning import ATOL, context, position, queries_and_keys, turned
from tests.models.tiny import VOCAB, tiny_model
from titan_lite.generation import KVCache
from titan_lite.models.position import ALiBi, NoPosition, RoPE
from titan_lite.models.position.alibi import ALiBiBias, slopes

HEADS = [1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 25, 32, 112]
RTOL = 1e-6


@pytest.mark.parametrize("n_heads", HEADS)
def test_against_transformers(n_heads: int):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    grid = ALiBiBias(n_heads).grid(torch.arange(9)[:, None], torch.arange(9)[None])  # (H, 9, 9)
    assert grid.dtype == torch.float32
    torch.testing.assert_close(grid[:, 8:], build_mpt_alibi_tensor(n_heads, 9), rtol=RTOL, atol=0)
    # Bloom's is off by a constant per head, which softmax does not see.
    bloom = build_alibi_tensor(torch.ones(1, 9), n_heads, torch.float32)  # (H, 1, 9)
    torch.testing.assert_close(grid[:, 8:] - grid[:, 8:, :1], bloom, rtol=RTOL, atol=0)


@pytest.mark.parametrize("n_heads", HEADS)
def test_grid_element_and_slopes_agree(n_heads: int):
    bias = ALiBiBias(n_heads)
    assert bias.slopes == slopes(n_heads)
    assert len(bias.slopes) == n_heads
    grid = bias.grid(torch.arange(3, 7)[:, None], torch.arange(7)[None])
    distance = (torch.arange(3, 7)[:, None] - torch.arange(7)).abs()
    torch.testing.assert_close(grid, -torch.tensor(bias.slopes)[:, None, None] * distance, rtol=RTOL, atol=0)
    head, q, k = torch.tensor(n_heads - 1), torch.tensor(6), torch.tensor(2)
    assert bias.element(head, q, k) == grid[n_heads - 1, 3, 2]


def test_eight_heads_as_in_the_paper():
    assert slopes(8) == (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256)


def test_queries_and_keys_stay_and_only_alibi_has_a_bias():
    q, k = queries_and_keys()
    for name, kind in (("alibi", ALiBi), ("none", NoPosition)):
        module = position(type=name)
        assert isinstance(module, kind)
        assert all(torch.equal(after, before) for after, before in zip(turned(module, q, k), (q, k), strict=True))
    assert (position(type="none").bias.key, position().bias.key) == ("", "")
    assert isinstance(position(), RoPE)
    assert position().bias.grid(q, k) is None
    assert position(type="alibi").bias.key != position(type="alibi", n_heads=8).bias.key
    assert position(type="alibi").prepare(context(3)) is None


@pytest.mark.parametrize("n_heads", [4, 6])
def test_attention_against_transformers_mpt(n_heads: int):
    """Biases stand beside scaled scores: before the scaling they would be sqrt(Dh) = 2.8 times smaller."""
    from transformers import MptConfig
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    dim = 8 * n_heads
    model = tiny_model(dim=dim, n_layers=1, attention={"n_heads": n_heads, "position": "alibi"})
    ours = model.stack.blocks["0"].attention
    theirs = MptAttention(MptConfig(d_model=dim, n_heads=n_heads, max_seq_len=20)).eval()
    with torch.no_grad():
        for linear in (ours.q, ours.k, ours.v, ours.o):
            linear.weight.normal_(std=0.3)
        theirs.Wqkv.weight.copy_(torch.cat((ours.q.weight, ours.k.weight, ours.v.weight)))
        theirs.out_proj.weight.copy_(ours.o.weight)
    x = torch.randn(2, 20, dim)
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, build_mpt_alibi_tensor(n_heads, 20), attention_mask=future)
    told = model.context(torch.zeros(2, 20, dtype=torch.long))
    torch.testing.assert_close(ours(x, told.layer(0, {})), expected, atol=ATOL, rtol=0)


def test_pieces_with_a_cache_equal_the_whole():
    model = tiny_model(attention={"n_heads": 4, "n_kv_heads": 2, "position": "alibi"})
    tokens = torch.randint(VOCAB, (2, 17))
    cache = KVCache(17)
    pieces = []
    for piece in tokens.split([5, 1, 4, 7], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=ATOL, rtol=0)
