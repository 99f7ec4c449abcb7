"""Parallel blocks against their formula and against GPT-NeoX and GPT-J."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import VOCAB, tiny_model
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
"""fp32, two layers."""
ADDITIVE = ("pre", "peri", "out_only", "none")


def randomized(**changes: Any) -> Transformer:
    model = tiny_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("residual", ADDITIVE)
def test_parallel_branches_see_the_same_stream(residual: str):
    """Each branch adds to x what it adds in a sequential block whose other branch is absent."""
    model = randomized(block="parallel", residual=residual)
    tokens = torch.randint(VOCAB, (2, 7))
    context = model.context(tokens)
    x = model.embedding(tokens, context)
    block = model.stack.blocks["0"]
    inside = context.layer(0, {})
    added = [r(x, branch, inside) - x for r, branch in branches(block)]
    torch.testing.assert_close(block(x, inside)[0], x + added[0] + added[1], atol=ATOL, rtol=0)


def branches(block: nn.Module) -> list[tuple[Any, nn.Module]]:
    return [(block.attention_residual, block.attention), (block.ffn_residual, block.ffn)]


@pytest.mark.parametrize("residual", [*ADDITIVE, "post", "sandwich_sum"])
def test_branches_share_one_residual(residual: str):
    model = randomized(block="parallel_shared_norm", residual={"type": residual, "scale": "layerscale"})
    tokens = torch.randint(VOCAB, (2, 7))
    context = model.context(tokens)
    x = model.embedding(tokens, context)
    block = model.stack.blocks["0"]
    inside = context.layer(0, {})

    def both(x: Tensor, context: Any) -> Tensor:
        return block.attention(x, context) + block.ffn(x, context)

    assert torch.equal(block(x, inside)[0], block.residual(x, both, inside))
    per_layer = {"pre": 1, "peri": 2, "out_only": 1, "none": 0, "post": 1, "sandwich_sum": 2}[residual]
    norms = [name for name, _ in block.named_parameters() if "norm" in name]
    assert len(norms) == per_layer


def copied(model: Transformer, reference: nn.Module, names: dict[str, str]) -> None:
    """Copies our parameters into the reference: all of both."""
    theirs = dict(reference.named_parameters())
    used: set[str] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                continue
            for ours, other in names.items():
                name = name.replace(ours, other)
            theirs[name].copy_(parameter)
            used.add(name)
    assert used == theirs.keys()


MLP = {"type": "mlp", "hidden": 48, "bias": True}


def test_against_transformers_gptj():
    from transformers import GPTJConfig, GPTJModel

    rope = {"type": "rope", "theta": 10000.0, "fraction": 0.5, "layout": "interleaved"}
    model = randomized(
        block="parallel_shared_norm",
        norm="layernorm",
        attention={"n_heads": 4, "position": rope},
        ffn=MLP | {"activation": "gelu_tanh"},
    )
    config = GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_inner=48, n_positions=64)
    reference = GPTJModel(config).eval()
    names = {"embedding.weight": "wte.weight", "stack.blocks": "h", "residual.norm": "ln_1", "attention": "attn"}
    names |= {
        f"attn.{letter}.": f"attn.{name}_proj." for letter, name in zip("qkvo", ("q", "k", "v", "out"), strict=True)
    }
    names |= {"ffn.up": "mlp.fc_in", "ffn.down": "mlp.fc_out"}
    copied(model, reference, {**names, "norm.": "ln_f."})
    tokens = torch.randint(VOCAB, (2, 19))
    ours = model(tokens, consume=lambda x, *_: x)
    torch.testing.assert_close(ours, reference(tokens).last_hidden_state, atol=ATOL, rtol=0)


def test_against_transformers_gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    model = randomized(
        block="parallel",
        norm="layernorm",
        attention={"n_heads": 4, "bias": list("qkvo"), "position": {"type": "rope", "fraction": 0.5}},
        ffn=MLP | {"activation": "gelu"},
    )
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    reference = GPTNeoXModel(config).eval()
    state = {
        "embed_in.weight": model.embedding.weight,
        "final_layer_norm.weight": model.norm.weight,
        "final_layer_norm.bias": model.norm.bias,
    }
    for index, block in model.stack.blocks.items():
        attention, ffn = block.attention, block.ffn
        modules = {
            "input_layernorm": block.attention_residual.norm,
            "post_attention_layernorm": block.ffn_residual.norm,
            "attention.dense": attention.o,
            "mlp.dense_h_to_4h": ffn.up,
            "mlp.dense_4h_to_h": ffn.down,
        }
        for kind in ("weight", "bias"):
            state |= {f"layers.{index}.{name}.{kind}": getattr(module, kind) for name, module in modules.items()}
            # One matrix whose rows are, head by head, those of its query, key and value.
            heads = [getattr(part, kind).unflatten(0, (4, 8)) for part in (attention.q, attention.k, attention.v)]
            state[f"layers.{index}.attention.query_key_value.{kind}"] = torch.stack(heads, 1).flatten(0, 2)
    reference.load_state_dict(state)
    tokens = torch.randint(VOCAB, (2, 19))
    ours = model(tokens, consume=lambda x, *_: x)
    torch.testing.assert_close(ours, reference(tokens).last_hidden_state, atol=ATOL, rtol=0)


@pytest.mark.parametrize("residual", ["post", "sandwich_sum", "admin", "ngpt"])
def test_parallel_refuses_residuals_that_change_the_sum(residual: str):
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"block": "parallel", "residual": residual}})
    problems = {problem.key: problem.why for problem in caught.value.problems}
    assert (
        f'model.residual.type = "pre" or "peri" or "out_only" or "none", not "{residual}"'
        in problems["model.block.type"]
    )
