"""Token embeddings and their tied heads against transformers' models and the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import DispatchedOps
from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.models.embedding import Embedding
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.linear import DefaultLinear
from titan_lite.models.norm import RMSNorm
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
"""fp32, single modules and two layers."""
DIM = 32
TOKENS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))


def embedding(**table: Any) -> Embedding:
    """An embedding for a model of width 32 with normally distributed parameters."""
    config = Embedding.Config.choose(table)
    made: Embedding = config.build(vocab_size=VOCAB, dim=DIM, linear=DefaultLinear.Config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def embedded(made: Embedding, tokens: Tensor = TOKENS) -> Tensor:
    return made(tokens, tiny_model().context(tokens))


def test_against_gpt2():
    from transformers import GPT2Config, GPT2Model

    made = embedding(position={"type": "learned", "max_len": 24})
    config = GPT2Config(
        n_layer=1, n_embd=DIM, n_head=4, vocab_size=VOCAB, n_positions=24, bos_token_id=0, eos_token_id=1
    )
    reference = GPT2Model(config).eval()
    state = {"wte.weight": made.weight, "wpe.weight": made.position.weight}
    assert reference.load_state_dict(state, strict=False).unexpected_keys == []
    expected = reference(TOKENS, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embedded(made), expected, atol=ATOL, rtol=0)


def test_scale_against_gemma():
    from transformers import GemmaConfig, GemmaModel

    made = embedding(scale="sqrt_dim")
    config = GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    reference = GemmaModel(config).eval()
    state = {"embed_tokens.weight": made.weight}
    assert reference.load_state_dict(state, strict=False).unexpected_keys == []
    expected = reference(TOKENS, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embedded(made), expected, atol=ATOL, rtol=0)


def test_both_ends_of_another_width_against_opt():
    """OPT with no layers: what is left are the embedding, its positions, and the head tied to it."""
    from transformers import OPTConfig, OPTForCausalLM

    model = tiny_model(
        embedding={"type": "low_rank", "width": 16, "position": {"type": "learned", "max_len": 24}},
        head={"tied": True},
    )
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=0,
        ffn_dim=8,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
    )
    reference = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        # OPT's table begins with two rows of its own.
        positions = torch.cat((torch.zeros(2, DIM), model.embedding.position.weight))
    state = {
        "embed_tokens.weight": model.embedding.weight,
        "embed_positions.weight": positions,
        "project_in.weight": model.embedding.wide.weight,
        "project_out.weight": model.head.narrow.weight,
    }
    state = {f"model.decoder.{name}": tensor for name, tensor in state.items()}
    assert reference.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    x = model.embedding(TOKENS, model.context(TOKENS))
    logits = model.head(x, model.embedding, lambda x, output: output.logits(x))
    torch.testing.assert_close(logits, reference(TOKENS).logits, rtol=ATOL, atol=ATOL)


def test_order_of_the_parts():
    made = embedding(type="low_rank", width=16, scale=3.0, norm={"type": "rmsnorm", "eps": 0.1}, position="sinusoidal")
    assert isinstance(made.norm, RMSNorm)
    x = 3.0 * F.embedding(TOKENS, made.weight) @ made.wide.weight.t()
    x = made.norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    x = x + embedded(embedding(position="sinusoidal")) - embedded(embedding())
    torch.testing.assert_close(embedded(made), x, atol=ATOL, rtol=0)


def test_what_is_off_is_no_operation():
    for table in ({}, {"scale": 1.0, "norm": "none", "dropout": 0.0, "position": "none", "warm_start": "none"}):
        made = embedding(**table)
        context = tiny_model().context(TOKENS)
        counter = DispatchedOps()
        counter.start()
        made(TOKENS, context)
        assert counter.stop() == {"aten.embedding": 1}
        assert [name for name, _ in made.named_parameters()] == ["weight"]


@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_low_rank_tables_can_be_written_out(norm: str):
    """E_in = norm(E W_in) and E_out = E W_out^T: an untied model of the model's width that computes the same."""
    low = tiny_model(embedding={"type": "low_rank", "width": 16, "norm": norm}, head={"tied": True})
    wide = tiny_model()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.normal_(std=0.2)
        table = low.embedding(torch.arange(VOCAB)[None], low.context(torch.arange(VOCAB)[None]))[0]
        out = low.embedding.weight @ low.head.narrow.weight
        shared = {n: p for n, p in low.named_parameters() if not n.startswith(("embedding", "head"))}
        wide.load_state_dict(shared | {"embedding.weight": table, "head.output.weight": out})
    torch.testing.assert_close(wide(TOKENS), low(TOKENS), atol=ATOL, rtol=0)


def test_low_rank_untied_head_works_on_the_models_width():
    model = tiny_model(embedding={"type": "low_rank", "width": 16})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(("embedding", "head"))}
    assert shapes == {
        "embedding.weight": (VOCAB, 16),
        "embedding.wide.weight": (DIM, 16),
        "head.output.weight": (VOCAB, DIM),
    }


# ---- tying


def loss_of(model: Transformer) -> Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


def test_a_tied_gradient_is_the_sum_of_both_paths():
    tied = tiny_model(head={"tied": True, "logit_scale": "learned"})
    untied = tiny_model(head={"logit_scale": "learned"})
    untied.load_state_dict(tied.state_dict(), strict=False)
    with torch.no_grad():
        untied.head.output.weight.copy_(tied.embedding.weight)
    loss_of(tied).backward()
    loss_of(untied).backward()
    both = untied.embedding.weight.grad + untied.head.output.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, atol=ATOL, rtol=0)
    scales = [model.head.logit_scale.s_z.value.grad for model in (tied, untied)]
    assert scales[0].count_nonzero() == VOCAB
    torch.testing.assert_close(*scales, atol=ATOL, rtol=0)


def test_a_tied_matrix_is_one_parameter():
    tied = tiny_model(head={"tied": True, "logit_scale": "learned"})
    seen: list[Tensor] = []
    tied(TOKENS, consume=lambda x, output: seen.append(output.weight) or x)
    assert seen[0] is tied.embedding.weight
    counts = [
        sum(p.numel() for p in model.parameters()) for model in (tied, tiny_model(head={"logit_scale": "learned"}))
    ]
    assert counts[1] - counts[0] == VOCAB * DIM


# ---- what others read


def test_specs_tell_tables_from_matrices():
    config = {"type": "low_rank", "width": 16, "norm": "layernorm", "position": {"type": "learned", "max_len": 8}}
    model = tiny_model(embedding=config, head={"tied": True, "bias": True})
    specs = {n: s for n, s in collect_specs(model).items() if n.startswith(("embedding", "head"))}
    assert {name: (spec.role, spec.fan_in, spec.fan_out, spec.start) for name, spec in specs.items()} == {
        "embedding.weight": ("embed", 1, 16, "weight"),
        "embedding.wide.weight": ("embed", 16, DIM, "weight"),
        "embedding.norm.weight": ("norm", 1, DIM, 1.0),
        "embedding.norm.bias": ("bias", 1, DIM, 0.0),
        "embedding.position.weight": ("embed", 1, DIM, "weight"),
        "head.narrow.weight": ("head", DIM, 16, "weight"),
        "head.bias": ("bias", 1, VOCAB, 0.0),
    }


@pytest.mark.parametrize(
    ("changes", "matrices"),
    [
        ({}, VOCAB * DIM),
        ({"head": {"tied": True}, "embedding": {"position": {"type": "learned", "max_len": 8}}}, VOCAB * DIM),
        ({"embedding": {"type": "low_rank", "width": 16}}, 16 * DIM + VOCAB * DIM),
        ({"embedding": {"type": "low_rank", "width": 16}, "head": {"tied": True}}, 2 * 16 * DIM + VOCAB * 16),
    ],
)
def test_flops_count_products_and_no_lookups(changes: dict[str, Any], matrices: int):
    """Beyond the same layers: 6 for each weight of the matrices at both ends."""

    def flops(**changes: Any) -> int:
        model = tiny_config(**changes).build(vocab_size=VOCAB)
        return training_flops_per_token(model, collect_specs(model), 16)

    assert flops(**changes) - flops() == 6 * (matrices - VOCAB * DIM)
