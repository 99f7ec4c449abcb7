"""Multi-token prediction against the papers' formulas, written out; what each position may see; sizes and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.hf.twins import preset_config
from tests.models.tiny import VOCAB, tiny_config, tiny_model
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.data.batch import IGNORE
from titan_lite.models.context import TrainingFacts
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer
from titan_lite.objectives.cross_entropy import CrossEntropy
from titan_lite.objectives.lm import LanguageModeling
from titan_lite.objectives.multi_token import MultiTokenPrediction, targets_ahead, weights_ahead

RTOL = 1e-5
ATOL = 1e-6
"""fp32, three layers, two predictions: gradients of up to about one unit."""
B, T, DEPTH, WEIGHT = 3, 11, 2, 0.7
KINDS = ["modules", "heads"]
NORMED = {"type": "modules", "reads": "normed"}
READERS = [*KINDS, "normed"]
"""Those, and modules that read what the head gets."""
LOGITS = {"logit_scale": "learned", "logit_cap": {"type": "tanh", "cap": 3.0}, "bias": True}


def table(kind: str) -> dict[str, Any]:
    choice = NORMED if kind == "normed" else {"type": kind}
    return {**choice, "depth": DEPTH, "weight": WEIGHT} if kind != "none" else {}


def model_with(kind: str, **changes: Any) -> Transformer:
    """Large enough weights for tokens to matter."""
    return tiny_model(**{"n_layers": 3, "mtp": table(kind), "init": {"type": "normal", "std": 0.15}} | changes)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, targets, documents (B, T): a row of one document, one of several, and one that has few targets."""
    tokens = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 11, [0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3], [0] * 6 + [1] * 5], dtype=torch.int32)
    targets = tokens[:, 1:].clone()
    targets[2, :5] = IGNORE
    return tokens[:, :-1], targets, documents


def alone(*counts: float) -> list[float]:
    return list(counts)


def gradients_of(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def objective(model: Transformer, weights: tuple[float, ...], chunk: int = 0, z_loss: float = 0.0) -> Tensor:
    """The mean loss, from which backward starts; `weights` are those of mean losses."""
    tokens, targets, documents = batch()
    n = int((targets != IGNORE).sum())
    facts = TrainingFacts(ahead=weights_ahead(weights, alone, [(targets, documents)], n))
    return MultiTokenPrediction(CrossEntropy(chunk, z_loss=z_loss))(model, tokens, targets, documents, facts) / n


def mean_of(logits: Tensor, targets: Tensor, documents: Tensor, k: int, z_loss: float) -> Tensor:
    """Over the positions whose token k + 1 ahead is a target, in the row and in the same document: one by one."""
    losses = []
    for row in range(B):
        for i in range(T - k):
            last = min(i + k + 1, T - 1)
            if targets[row, i + k] != IGNORE and (k == 0 or documents[row, last] == documents[row, i]):
                z = logits[row, i]
                losses.append(z.logsumexp(0) - z[targets[row, i + k]] + z_loss * z.logsumexp(0) ** 2)
    return torch.stack(losses).mean()


def by_hand(model: Transformer, kind: str, z_loss: float = 0.0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of all tokens ahead, and the gradients of the objective; on slices of the row, as the paper has it."""
    tokens, targets, documents = batch()

    def through(blocks: Sequence[Any], x: Tensor) -> Tensor:
        length = x.shape[1]
        context = model.context(tokens[:, :length], documents[:, :length])
        for block in blocks:
            x, _ = block(x, context.layer(0, {}))
        return x

    def loss(state: Tensor, k: int) -> Tensor:
        head = model.head
        z = state @ head.output.weight.t() + head.output.bias
        return mean_of(3.0 * torch.tanh(head.logit_scale.s_z() * z / 3.0), targets, documents, k, z_loss)

    blocks = list(model.stack.blocks.values())
    e = F.embedding(tokens, model.embedding.weight)
    trunk = through(blocks[:-1], e)
    x = through(blocks[-1:], trunk)
    losses = [loss(model.norm(x), 0)]
    for k in range(1, DEPTH + 1):
        part = model.mtp.predictors[str(k)]
        if kind == "heads":
            losses.append(loss(model.norm(through([part], trunk)), k))
            continue
        if kind == "normed":
            last = model.norm if k == 1 else model.mtp.predictors[str(k - 1)].norm
            x = F.rms_norm(x, (32,), eps=1e-5) * last.weight
        normed = [F.rms_norm(x[:, : T - k], (32,), eps=1e-5), F.rms_norm(e[:, k:], (32,), eps=1e-5)]
        normed = [h * norm.weight for h, norm in zip(normed, (part.hidden_norm, part.token_norm), strict=True)]
        x = through([part.block], torch.cat(normed, dim=-1) @ part.join.weight.t())
        losses.append(loss(F.rms_norm(x, (32,), eps=1e-5) * part.norm.weight, k))
    share = WEIGHT if kind == "heads" else WEIGHT / DEPTH
    return losses, gradients_of(model, losses[0] + share * sum(losses[1:]))


@pytest.mark.parametrize("masks", [["causal"], ["causal", "document"]])
@pytest.mark.parametrize("chunk", [0, 7, B * T])
@pytest.mark.parametrize("kind", READERS)
def test_losses_and_gradients_are_those_of_the_formula(kind: str, chunk: int, masks: list[str]):
    changes = {"attention": {"n_heads": 4, "n_kv_heads": 2, "masks": masks}, "head": LOGITS}
    model = model_with(kind, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    expected, gradients = by_hand(model, kind, z_loss=0.1)
    loss = objective(model, tiny_config(mtp=table(kind)).mtp.weights(), chunk, z_loss=0.1)
    found = gradients_of(model, loss)
    model.mtp.after_step(lambda tensor: tensor)
    metrics = model.mtp.metrics(lambda tensor: tensor)
    assert loss.item() == pytest.approx(expected[0].item(), rel=RTOL)
    assert metrics.keys() == {"loss_1", "loss_2"}
    for k in (1, 2):
        assert metrics[f"loss_{k}"].item() == pytest.approx(expected[k].item(), rel=RTOL)
    assert found.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=ATOL, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_without_weight_it_is_next_token_prediction(kind: str):
    """The loss is the same one to the bit whatever the weights; the gradients are where these are 0."""
    model, plain = model_with(kind), model_with("none")
    shared = dict(plain.named_parameters())
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in shared})
    tokens, targets, documents = batch()
    n = int((targets != IGNORE).sum())
    expected = LanguageModeling(CrossEntropy(0))(plain, tokens, targets, documents) / n
    assert torch.equal(objective(model, (0.3, 0.3)), expected)
    assert torch.equal(objective(model, ()), expected)
    gradients = gradients_of(plain, expected)
    found = gradients_of(model, objective(model, (0.0, 0.0)))
    for name, gradient in found.items():
        wanted = gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-7, msg=name)
    assert torch.equal(model(tokens), plain(tokens))


def states_of(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """What the head gets for the next token and those behind it."""
    found: list[Tensor] = []

    def consume(x: Tensor, output: Any, *further: Tensor) -> Tensor:
        found.extend((x, *further))
        return x

    model(tokens, consume=consume, further=model.mtp)
    return found


@pytest.mark.parametrize("kind", READERS)
@torch.no_grad()
def test_a_position_sees_only_what_is_before_its_target(kind: str):
    """The module k at position i reads tokens up to i + k, and the last of them; heads read none behind i."""
    model, changed = model_with(kind), 6
    tokens, _, _ = batch()
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    before, after = states_of(model, tokens), states_of(model, other)
    assert len(before) == 1 + DEPTH
    for k in range(1 + DEPTH):
        ahead = 0 if kind == "heads" else k
        # Where there is no target, modules read the row's first tokens.
        moved = (before[k] != after[k])[:, : T - k].any(-1)
        assert not moved[:, : changed - ahead].any(), f"prediction {k}"
        assert moved[:, changed - ahead :].all(), f"prediction {k}"


def test_targets_end_with_the_document_and_with_the_row():
    targets = torch.tensor([[11, 12, 13, 14, 15, IGNORE, 17, 18]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    x = IGNORE
    # Token 13 is the first of document 1.
    assert targets_ahead(targets, documents, 1).tolist() == [[12, x, x, 15, x, 17, 18, x]]
    assert targets_ahead(targets, documents, 2).tolist() == [[x, x, x, x, 17, 18, x, x]]
    assert targets_ahead(targets, documents, 7).tolist() == [[x] * 8]


def test_weights_count_all_ranks_and_micro_batches():
    _, targets, documents = batch()
    counts = [int((targets_ahead(targets, documents, k) != IGNORE).sum()) for k in (1, 2)]
    parts = [(targets[:1], documents[:1]), (targets[1:], documents[1:])]
    found = weights_ahead((0.5, 0.25), lambda *own: [3.0 * n for n in own], parts, 84)
    assert found == pytest.approx((0.5 * 84 / (3 * counts[0]), 0.25 * 84 / (3 * counts[1])))
    assert weights_ahead((0.5,), alone, [(targets[:, :1], documents[:, :1])], 1) == (0.5,)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_flops(kind: str, tied: bool):
    """By hand: a block, and of modules two norms before it, one behind, and the matrix that joins; the head again."""
    model, plain = model_with(kind, head={"tied": tied}), model_with("none", head={"tied": tied})
    attention, ffn = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    block = attention + ffn + 2 * 32
    joined = 2 * 32 * 32 if kind == "modules" else 0
    norms = 3 * 32 if kind == "modules" else 0
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == DEPTH * (block + joined + norms)
    seq_len = 20
    scores = 2 * 4 * (8 + 8) * seq_len
    expected = DEPTH * 3 * (2 * (attention + ffn + joined + 32 * VOCAB) + scores)
    counted = [training_flops_per_token(m, collect_specs(m), seq_len) for m in (model, plain)]
    assert counted[0] - counted[1] == expected


def test_deepseek_v3_has_as_many_parameters_as_published():
    """11.5 billion of its own (README_WEIGHTS.md); with embedding and head, 14 of the hub's 685."""
    config, dim = preset_config("deepseek_v3", "671B"), 7168
    with torch.device("meta"):
        model = config.build(vocab_size=config.vocab_size)
    mla = dim * 1536 + 1536 * 128 * 192 + dim * 576 + 512 * 128 * 256 + 128 * 128 * dim + 1536 + 512
    own = sum(p.numel() for p in model.mtp.parameters())
    assert own == 257 * 3 * dim * 2048 + 256 * dim + 2 * dim * dim + 5 * dim + mla
    assert round(own / 1e9, 1) == 11.6
    assert round((own + 2 * 129280 * dim) / 1e9, 1) == 13.5


def test_blocks_are_like_the_last_layer():
    layers = [{"at": -1, "ffn": {"type": "mlp", "hidden": 24}, "norm": "layernorm"}]
    for kind in KINDS:
        names = {name for name in model_with(kind, layers=layers).state_dict() if name.startswith("mtp.predictors.2.")}
        assert any(name.endswith("ffn.up.weight") for name in names)
        assert not any("ffn.gate" in name for name in names)
        assert any(name.endswith("attention_residual.norm.bias") for name in names)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "memory": ({"mtp": "heads", "memory": {"type": "xl", "length": 4}}, "model.mtp.type", "model.memory.type"),
    "admin": ({"mtp": "modules", "residual": "admin"}, "model.mtp.type", "model.residual.type"),
    "ngpt": ({"mtp": "modules", "residual": "ngpt", "norm": "none"}, "model.mtp.type", "model.residual.type"),
    "recurrent": (
        {"mtp": "heads", "residual": "sandwich_sum", "stack": {"type": "recurrent", "prelude": 1, "coda": 0}},
        "model.mtp.type",
        "model.stack.type",
    ),
    "depth": ({"mtp": {"type": "modules", "depth": 16}}, "model.mtp.depth", "training.seq_len"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_both_keys(name: str):
    changes, key, other = REFUSED[name]
    tables = {"model": {"dim": 32, "n_layers": 2, **changes}, "training": {"seq_len": 16}}
    with pytest.raises(ConfigError) as caught:
        job_from_dict(tables)
    (problem,) = [problem for problem in caught.value.problems if problem.key == key]
    assert problem.code == CROSS_FIELD
    assert other in problem.why


def test_its_weight_is_no_part_of_what_a_model_is():
    identities = [tiny_config(mtp={"type": "modules", **more}).identity() for more in ({}, {"weight": 0.1})]
    assert identities[0] == identities[1]
    for more in ({"depth": 2}, {"reads": "normed"}):
        assert tiny_config(mtp={"type": "modules", **more}).identity() != identities[0]
