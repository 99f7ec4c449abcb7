"""Value residual: the first layer's values in all others, however the layers are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import VOCAB, tiny_model
from tests.runs import Run, tiny_job, train
from titan_lite.config.errors import ConfigError
from titan_lite.generation import KVCache

ATOL = 1e-5
MIXING = {"n_heads": 4, "n_kv_heads": 2, "value_mix": "residual"}
MODEL = {"dim": 32, "n_layers": 3, "attention": MIXING}
TOKENS = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [model.stack.blocks[str(i)].attention.value_mix.weights for i in range(3)]


def projected(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Each layer's values, as `W_v` makes them."""
    values: list[Tensor] = []
    for block in model.stack.blocks.values():
        block.attention.v.register_forward_hook(lambda *args: values.append(args[-1]))
    model(tokens)
    return values


def mixed(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Each layer's values, as they are attended to."""
    values: list[Tensor] = []
    for block in model.stack.blocks.values():
        block.attention.value_mix.register_forward_hook(lambda *args: values.append(args[-1]))
    model(tokens)
    return [value.transpose(1, 2).flatten(2) for value in values]


def test_it_starts_half_and_half():
    model = tiny_model(**MODEL)
    assert [w.tolist() for w in weights(model)] == [[0.5, 0.5]] * 3
    own, used = projected(model, TOKENS), mixed(model, TOKENS)
    torch.testing.assert_close(used[0], own[0], atol=ATOL, rtol=0)
    for i in (1, 2):
        torch.testing.assert_close(used[i], (own[i] + own[0]) / 2, atol=ATOL, rtol=0)


def test_the_first_values_are_mixed_in_as_they_were():
    """What is carried are the first layer's own values, whatever it makes of them itself."""
    model = tiny_model(**MODEL)
    with torch.no_grad():
        for w, numbers in zip(weights(model), ([0.3, 0.4], [0.9, -0.2], [0.1, 2.0]), strict=True):
            w.copy_(torch.tensor(numbers))
    own, used = projected(model, TOKENS), mixed(model, TOKENS)
    expected = [0.7 * own[0], 0.9 * own[1] - 0.2 * own[0], 0.1 * own[2] + 2 * own[0]]
    for value, formula in zip(used, expected, strict=True):
        torch.testing.assert_close(value, formula, atol=ATOL, rtol=0)


def test_all_of_its_own_is_a_plain_model():
    model, plain = tiny_model(**MODEL), tiny_model(**MODEL | {"attention": {"n_heads": 4, "n_kv_heads": 2}})
    with torch.no_grad():
        for w in weights(model):
            w.copy_(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=ATOL, rtol=0)


def test_layers_before_the_first_that_mixes_leave_nothing():
    model = tiny_model(dim=32, n_layers=3, layers=[{"at": "1:", "attention": {"value_mix": "residual"}}])
    own: list[Tensor] = []
    for block in model.stack.blocks.values():
        block.attention.v.register_forward_hook(lambda *args: own.append(args[-1]))
    last: list[Tensor] = []
    model.stack.blocks["2"].attention.value_mix.register_forward_hook(lambda *args: last.append(args[-1]))
    model(TOKENS)
    torch.testing.assert_close(last[0].transpose(1, 2).flatten(2), (own[2] + own[1]) / 2, atol=ATOL, rtol=0)


def test_cache_gives_the_logits_of_a_full_forward():
    model, cache, pieces = tiny_model(**MODEL), KVCache(16), []
    for piece in TOKENS.split([7, 1, 8], dim=1):
        pieces.append(model(piece, memory=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(TOKENS), atol=ATOL, rtol=0)


def run(mode: str = "none", compiled: bool = False, rows: int = 8) -> Run:
    """Three steps; the weights of the mix move in each, so a gradient that is lost shows."""
    torch._dynamo.reset()
    sections: dict[str, Any] = {
        "model": MODEL,
        "activation_checkpoint": {"mode": mode, "selective_ac_option": "op"},
        "compile": {"enable": compiled, "components": ["model"], "backend": "aot_eager"},
        "training": {"local_batch_size": rows},
    }
    return train(sections, 3)


def assert_same(run: Run, expected: Run) -> None:
    torch.testing.assert_close(run.losses, expected.losses, atol=ATOL, rtol=0)
    torch.testing.assert_close(run.weights, expected.weights, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def plain_run() -> Run:
    plain = run()
    assert not torch.equal(plain.weights["stack.blocks.2.attention.value_mix.weights"], torch.tensor([0.5, 0.5]))
    return plain


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputed_and_compiled_layers(mode: str, compiled: bool, plain_run: Run):
    assert_same(run(mode, compiled), plain_run)


@pytest.mark.parametrize(("mode", "compiled"), [("none", False), ("full", True)])
def test_on_two_ranks(mode: str, compiled: bool, plain_run: Run, pool2: Any):
    for of_rank in pool2.run(run, mode, compiled, 4):
        assert_same(of_rank, plain_run)


def test_values_of_another_shape_are_refused():
    layers = [{"at": "2", "attention": {"n_kv_heads": 4}}]
    with pytest.raises(ConfigError) as error:
        tiny_job(model={**MODEL, "layers": layers})
    (problem,) = error.value.problems
    assert problem.key == "model.layers[0].attention.value_mix.type"
    assert "model.attention" in problem.why
    layers = [{"at": "0", "attention": {"n_kv_heads": 4, "value_mix": "none"}}]
    assert tiny_job(model={**MODEL, "layers": layers})
