"""What a person writes who needs one model and one loop: the yardstick of train_throughput.py and the op-count test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_


class Loop:
    """AdamW with decay on matrices, clipping, a constant learning rate; `forward` is (tokens, targets) -> loss."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor, Tensor], Tensor], lr: float, max_norm: float):
        self.forward, self.max_norm = forward, max_norm
        self.parameters = list(model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step; returns the loss before it."""
        loss = self.forward(tokens, targets)
        loss.backward()
        clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over the targets that are not -100."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


class PlainBlock(nn.Module):
    """Causal grouped-query attention with rotary positions, then SwiGLU, both pre-norm."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, hidden: int):
        super().__init__()
        self.head_dim = dim // n_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        h = self.attention_norm(x)
        q = rotate(self.q(h).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, H, T, Dh)
        k = rotate(self.k(h).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, G, T, Dh)
        v = self.v(h).view(B, T, -1, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainTransformer(nn.Module):
    """Tokens (B, T) -> logits (B, T, V). Its parameters come in the order of the trainer's model of the same shape."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        hidden: int,
        seq_len: int,
        theta: float = 10000.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, n_heads, n_kv_heads, hidden) for _ in range(n_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        head_dim = dim // n_heads
        angles = torch.outer(torch.arange(seq_len), theta ** -(torch.arange(0, head_dim, 2) / head_dim))  # (T, Dh/2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(self.norm(x))

    @torch.no_grad()
    def copy_weights(self, other: nn.Module) -> PlainTransformer:
        """Takes the weights of a model whose parameters have the same shapes in the same order."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            assert mine.shape == theirs.shape
            mine.copy_(theirs)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (..., T, Dh), half-split pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
