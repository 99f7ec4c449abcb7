"""Recurrent depth: against a plain model, against iterating by hand, and what a cache must give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import VOCAB, tiny_model
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.generation import KVCache
from titan_lite.models.context import Iterations, TrainingFacts
from titan_lite.models.dropout import Noise
from titan_lite.models.flops import training_flops_per_token
from titan_lite.models.spec import collect_specs
from titan_lite.models.transformer import Transformer

ATOL = 1e-5
"""fp32, ten executed layers: decoded with a cache against a full forward."""
CPU = torch.device("cpu")
TOKENS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def recurrent(residual: str = "sandwich_sum", n_layers: int = 4, **stack: Any) -> Transformer:
    """One layer of prelude, two of core, one of coda, if nothing else is said; 4 iterations outside training."""
    tables = {"type": "recurrent", "mean_iterations": 4, "backprop_iterations": 2} | stack
    return tiny_model(residual=residual, n_layers=n_layers, stack=tables)


def facts(n: int, k: int, step: int = 0, rows: range = range(2)) -> TrainingFacts:
    return TrainingFacts(noise=Noise.of(0, CPU, step, torch.tensor(rows)), iterations=Iterations(n, k))


def gradients(model: Transformer, told: TrainingFacts) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS, facts=told).sin().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_one_iteration_of_nothing_else_is_a_plain_model():
    model = recurrent(n_layers=2, residual="pre", prelude=0, coda=0, adapter="add", state="zero")
    plain = tiny_model(n_layers=2)
    # The stack's one norm acts before the coda and behind it: once more than the plain model's.
    weights = {name.replace("stack.norm", "norm"): parameter for name, parameter in model.named_parameters()}
    plain.load_state_dict(weights)
    x = plain.stack(plain.embedding(TOKENS, plain.context(TOKENS)), plain.context(TOKENS)).x
    expected = plain.head(plain.norm(plain.norm(x)), plain.embedding, lambda x, output: output.logits(x))
    assert torch.equal(model(TOKENS, facts=facts(0, 1)), expected)


def by_hand(model: Transformer, told: TrainingFacts) -> Tensor:
    """Iterates module by module; the state is cut from the graph after the first iterations."""
    context = model.context(TOKENS, facts=told)
    stack = model.stack

    def through(numbers: str, x: Tensor) -> Tensor:
        for number in numbers:
            x, _ = stack.blocks[number](x, context.layer(0, {}))
        return x

    e = through("0", model.embedding(TOKENS, context))
    state = stack.state(e, context)
    for i in range(sum(told.iterations)):
        state = through("12", stack.adapter(state, e))
        state = state.detach() if i < told.iterations.ungraded else state
    return model.head(stack.norm(through("3", stack.norm(state))), model.embedding, lambda x, output: output.logits(x))


@pytest.mark.parametrize("adapter", ["concat", "add", "gate"])
@pytest.mark.parametrize(("n", "k"), [(3, 2), (0, 2), (1, 1)])
def test_backward_goes_through_the_last_iterations(adapter: str, n: int, k: int):
    """Equal to the bit in what is computed; gradients equal those with a detached state s_n."""
    model = recurrent(adapter=adapter)
    found = gradients(model, facts(n, k))
    model.zero_grad()
    result = by_hand(model, facts(n, k))
    assert torch.equal(model(TOKENS, facts=facts(n, k)), result)
    result.sin().sum().backward()
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=name)
    whole = gradients(model, facts(0, n + k))
    assert n == 0 or any(not torch.equal(whole[name], found[name]) for name in found)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_iterations_outside_training(n: int):
    model = recurrent(exit={"type": "fixed", "iterations": n}, state="zero")
    assert torch.equal(model(TOKENS), model(TOKENS, facts=facts(0, n)))
    assert not torch.equal(model(TOKENS), model(TOKENS, facts=facts(0, n + 1)))


@pytest.mark.parametrize("state", ["like", "normal", "embed", "unit", "zero", "none"])
def test_a_cache_gives_the_logits_of_a_full_forward(state: str):
    model = recurrent(state=state)
    cache = KVCache(9)
    pieces = []
    for piece in TOKENS.split([4, 1, 1, 3], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    assert sorted(cache.layers) == list(range(1 + 1 + 4 * 2))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(TOKENS), atol=ATOL, rtol=0)


def test_tokens_change_nothing_before_them():
    model = recurrent()
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    for told in (TrainingFacts(), facts(2, 2)):
        before, after = model(TOKENS, facts=told), model(changed, facts=told)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5], after[:, 5])


def test_dropout_falls_differently_in_each_iteration():
    """With one mask for all iterations, a core that is only dropout would drop what it has dropped already."""
    model = recurrent("pre")
    seen: list[Tensor] = []
    for number in ("1", "2"):
        model.stack.blocks[number].register_forward_pre_hook(lambda _, args: seen.append(args[1].noise.key))
    model(TOKENS, facts=facts(1, 2))
    assert len({int(key) for key in seen}) == 6


def test_carried_values_come_from_the_first_layer():
    attention = {"n_heads": 4, "value_mix": "residual"}
    stack = {"type": "recurrent", "mean_iterations": 3}
    model = tiny_model(n_layers=4, residual="sandwich_sum", attention=attention, stack=stack)
    cache = KVCache(9)
    pieces = []
    for piece in TOKENS.split([4, 1, 4], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(TOKENS), atol=ATOL, rtol=0)
    assert gradients(model, facts(2, 1))["stack.blocks.0.attention.value_mix.weights"].abs().sum() > 0


def test_one_norm_before_and_behind_the_coda():
    model = recurrent()
    calls = []
    model.stack.norm.register_forward_hook(lambda *_: calls.append(1))
    model(TOKENS)
    assert len(calls) == 2
    assert [name for name, _ in model.named_parameters() if name.startswith("norm")] == []


def test_initial_weights_count_the_mean_of_executed_layers():
    stack = {"type": "recurrent", "mean_iterations": 32}
    model = tiny_model(dim=128, n_layers=4, residual="sandwich_sum", stack=stack, init="like")
    std = (2 / (5 * 128)) ** 0.5
    block = model.stack.blocks["1"]
    assert block.attention.q.weight.std().item() == pytest.approx(std, rel=0.02)
    assert model.stack.adapter.linear.weight.std().item() == pytest.approx(std, rel=0.02)
    assert block.attention.o.weight.std().item() == pytest.approx(std / (2 * (1 + 1 + 2 * 32)) ** 0.5, rel=0.02)


def test_flops_are_those_that_run():
    """By hand: weights and scores outside the core 3 times, those of the core and the adapter r + 2 k times."""
    model = recurrent(mean_iterations=32, backprop_iterations=8)
    specs = collect_specs(model)
    layer = 32 * 32 * (2 + 2 * 0.5) + 3 * 32 * 48  # q and o, half as wide k and v, feed-forward
    scores = 2 * 2 * 32 * 16
    outside = 2 * (2 * layer + VOCAB * 32) + 2 * scores
    core = 2 * (2 * layer + 2 * 32 * 32) + 2 * scores

    def count(iterations: Iterations | None) -> int:
        return training_flops_per_token(model, specs, 16, iterations)

    assert count(Iterations(5, 8)) == 3 * outside + (13 + 2 * 8) * core
    assert count(Iterations(0, 3)) == 3 * outside + (3 + 2 * 3) * core
    expected = model.stack.sampling.expected()
    assert count(None) == pytest.approx(3 * outside + (expected.forward + 2 * expected.graded) * core)
    fixed = recurrent(mean_iterations=32, backprop_iterations=8, sampling="fixed")
    assert training_flops_per_token(fixed, collect_specs(fixed), 16) == 3 * outside + (32 + 2 * 8) * core


@pytest.mark.parametrize(
    ("model", "key", "other"),
    [
        ({"residual": "admin"}, "model.stack.type", "model.residual.type"),
        ({"residual": "ngpt", "norm": "none"}, "model.stack.type", "model.residual.type"),
        ({"residual": "none"}, "model.stack.type", "model.residual.type"),
        ({"final_norm": "rmsnorm"}, "model.stack.type", "model.final_norm.type"),
        ({"n_layers": 2}, "model.stack.prelude", "model.n_layers"),
        (
            {"stack": {"type": "recurrent", "adapter": "gate", "state": "zero"}},
            "model.stack.adapter.type",
            "model.stack.state.type",
        ),
        (
            {"stack": {"type": "recurrent", "exit": {"type": "kl", "iterations": 1}}},
            "model.stack.exit.iterations",
            "exit.type",
        ),
    ],
)
def test_refusals(model: dict[str, Any], key: str, other: str):
    tables = {"n_layers": 4, "residual": "sandwich_sum", "stack": "recurrent"} | model
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": tables, "activation_checkpoint": {"mode": "none"}})
    found = {problem.key: problem for problem in caught.value.problems}
    assert found[key].code == CROSS_FIELD
    assert other in found[key].why


def test_rezero_is_warned_of():
    model = {"n_layers": 4, "residual": {"type": "pre", "scale": "rezero"}, "stack": "recurrent"}
    job = job_from_dict({"model": model, "activation_checkpoint": {"mode": "none"}})
    assert any("model.stack.type" in line and "rezero" in line for line in job.warnings)


@pytest.mark.parametrize(("every", "legal"), [("2", True), ("1", True), ("3", False), ("op", True)])
def test_every_nth_layer_must_divide_the_core(every: str, legal: bool):
    model = {"n_layers": 4, "residual": "sandwich_sum", "stack": "recurrent"}
    tables = {"model": model, "activation_checkpoint": {"mode": "selective", "selective_ac_option": every}}
    if legal:
        job_from_dict(tables)
    else:
        with pytest.raises(ConfigError, match=r"activation_checkpoint\.selective_ac_option"):
            job_from_dict(tables)
